"""The server as a process, before it serves."""

import contextlib
import datetime
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support import AS_SHIPPED, Daemon, Server, wait_until
from tiny import chat_model

pytestmark = pytest.mark.vllm


def engine(server: Server) -> bool:
    """Is it there, and about to load?"""
    for pid in server.group():
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::EngineCor"):
                return True
    return False


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell lets what it starts in its background ignore INT, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_while_it_loads_ends(tmp_path: Path, number: signal.Signals) -> None:
    """At once: what it does when it has loaded is another thing."""
    model = chat_model(tmp_path / "model")
    server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock", **AS_SHIPPED)
    try:
        wait_until(lambda: engine(server), "its engine is started")
        server.popen.send_signal(number)
        assert server.popen.wait(60) == 128 + number, server.tail()
        assert "offering it" not in server.log.read_text()
    finally:
        server.kill()


def test_a_draft_model_is_not_what_is_trained(tmp_path: Path) -> None:
    """It came with a configuration of its own, and was given an arena beside that of the model, which was refused."""
    model, draft = chat_model(tmp_path / "model"), chat_model(tmp_path / "draft", seed=1)
    speculate = json.dumps({"model": str(draft), "num_speculative_tokens": 2})
    server = Server(
        model, tmp_path / "server.log", tmp_path / "arena.sock", more=["--speculative-config", speculate]
    )
    try:
        server.wait_ready()
        assert httpx.get(f"{server.url}/hogwild/status").json()["model"] == str(model)
        assert server.ask("w5 w6")
    finally:
        server.kill()


def certificate(file: Path) -> Path:
    """Key and certificate, signed by itself, of a server that others know by a name."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=llm.example.org")
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("llm.example.org")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def test_the_daemon_finds_a_server_by_what_its_own_configuration_file_says(tmp_path: Path) -> None:
    """vLLM's --config may also say that it speaks TLS: the daemon asked another address, and never trained. Nor did it
    where a server takes shorter texts than those that are compared."""
    pem, sock, model = (
        certificate(tmp_path / "server.pem"),
        tmp_path / "arena.sock",
        chat_model(tmp_path / "model"),
    )
    (config := tmp_path / "vllm.yaml").write_text(
        f"host: 127.0.0.1\nssl-certfile: {pem}\nssl-keyfile: {pem}\napi-server-count: 2\ntokenizer: {model}\n"
        "chat-template: '{{ 1 }}'\n"
    )
    server = Server(
        model,
        tmp_path / "server.log",
        sock,
        more=["--max-model-len", "12"],
        HOGWILD_SERVER__ARGUMENTS=json.dumps(["--config", str(config)]),
    )
    daemon = Daemon(tmp_path, sock)
    try:
        assert daemon.wait_for("server.attached")["url"] == f"https://127.0.0.1:{server.port}"
        daemon.wait_for("training.started")
        said = server.log.read_text()
        assert "is known to the server alone" not in said, "the tokenizer is the model's own"
        assert not daemon.events("prompts.differ"), "the daemon was told of the template"
        doctor = daemon.command("doctor", "--quick", "--json")
        assert f"https://127.0.0.1:{server.port} serves generation 0" in doctor.stdout
    finally:
        daemon.kill()
        server.kill()


def test_a_server_out_of_reach_is_refused_wherever_that_was_said(tmp_path: Path) -> None:
    (config := tmp_path / "vllm.yaml").write_text("headless: true\ntokens-only: true\nssl-cert-reqs: 2\n")
    server = Server(
        chat_model(tmp_path / "model"),
        tmp_path / "server.log",
        tmp_path / "arena.sock",
        HOGWILD_SERVER__ARGUMENTS=json.dumps(["--config", str(config)]),
        VLLM_USE_RUST_FRONTEND="1",
    )
    try:
        assert server.popen.wait(120) == 2, server.tail()
        for what in ("--headless", "--tokens-only", "--ssl-cert-reqs", "VLLM_USE_RUST_FRONTEND"):
            assert f"{what}: " in server.tail() or f"{what} 2: " in server.tail()
    finally:
        server.kill()
