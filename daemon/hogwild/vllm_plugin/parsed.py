"""What vLLM has understood of its command line, of which a part may be in the file of `--config`. Imports no vllm."""

import argparse
import json
import logging
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

from hogwild.chat_settings import ChatSettings
from hogwild.errors import UsageError
from hogwild.vllm_plugin.names import LOAD_FORMAT

log = logging.getLogger("vllm.hogwild.parsed")

_LONGEST = 100_000
"""Characters of JSON that go into an environment variable; Linux takes 131072 bytes."""


def refuse(args: argparse.Namespace) -> None:
    """Raises UsageError for what would take the weights, or the server, out of the daemon's reach."""
    if problems := list(_problems(args)):
        raise UsageError("\n".join(problems))


def _problems(args: argparse.Namespace) -> Iterator[str]:
    asks = "the daemon asks the server over HTTP whether it serves what is trained"
    if args.load_format != LOAD_FORMAT:
        yield (
            f"--load-format {args.load_format}: nothing could be trained; leave it out, hogwild loads safetensors "
            "itself"
        )
    if args.uds:
        yield f"--uds: {asks}; give --port"
    for name in ("grpc", "headless", "tokens_only"):
        if getattr(args, name, False):
            yield f"--{name.replace('_', '-')}: {asks}; leave it out"
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        yield (
            "VLLM_USE_RUST_FRONTEND: requests would pass by what keeps answers fresh (docs/serving.md), and training "
            "would not stand aside for them; unset it"
        )
    if args.ssl_cert_reqs == ssl.CERT_REQUIRED:
        yield f"--ssl-cert-reqs {args.ssl_cert_reqs}: {asks}, and has no certificate to show; leave it out"


def url(args: argparse.Namespace) -> str:
    """Where this machine reaches the server."""
    return address(args.host, args.port, secure=bool(args.ssl_certfile or args.ssl_keyfile))


def full_path(certificate: str | None) -> str:
    """Of the file that a server shows a certificate from; empty: it shows none."""
    return str(Path(certificate).absolute()) if certificate else ""


def address(host: str | None, port: object, *, secure: bool) -> str:
    """The URL by which this machine reaches a server that listens on `host`, or on all that there are."""
    host = host or "127.0.0.1"
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{host}:{port}"


def chats(args: argparse.Namespace) -> str:
    """What the server has been told of chats, for the trainer."""
    given = ChatSettings.given(args.chat_template, getattr(args, "default_chat_template_kwargs", None))
    said = json.dumps(given.to_json())
    if len(said) <= _LONGEST:
        return said
    _alone("chat_template")
    return "null"


def warn(args: argparse.Namespace) -> None:
    """Say in the log what the server has been told and the trainer has not."""
    model = getattr(args, "model_tag", None) or args.model
    if args.tokenizer and args.tokenizer != model:
        _alone("tokenizer")


def _alone(name: str) -> None:
    log.warning(
        "hogwild: --%s is known to the server alone: what is dropped is trained with what lies in the model's "
        "folder; put it there, for both", name.replace("_", "-"),
    )  # fmt: skip
