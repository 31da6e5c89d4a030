"""A server that answers over https, with a certificate that is not issued for 127.0.0.1."""

import datetime
import http.server
import json
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hogwild import served
from hogwild.vllm_plugin import launch, ready
from hogwild.vllm_plugin.names import CERTIFICATE_VARIABLE, URL_VARIABLE
from studio import Studio, model
from support import SERVER_ARGUMENTS, Daemon, Process, environment, free_port
from test_doctor import Service
from tiny import chat_model

QUIET = {"replay__self_texts": 0, "probes__own": 0}
KEY = "HOGWILD_API_KEY"


class Issued:
    """A certificate, its key, and both as files that a server takes.

    Args:
        by: who signed it, whose own follows in the file; None: itself.
    """

    def __init__(self, folder: Path, name: str, by: "Issued | None" = None, days: int = 1) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(by.subject if by else self.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        )
        signed = builder.sign(by.key if by else self.key, hashes.SHA256())
        self.pem = signed.public_bytes(serialization.Encoding.PEM) + (by.pem if by else b"")
        self.certfile, self.keyfile = folder / f"{name}.pem", folder / f"{name}.key"
        self.certfile.write_bytes(self.pem)
        self.keyfile.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


class Plain(http.server.BaseHTTPRequestHandler):
    """Is healthy, and is no vLLM."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


class Quiet(http.server.ThreadingHTTPServer):
    """Somebody who does not believe it hangs up, which is no fault."""

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(issued: Issued, port: int = 0, *, wants_a_certificate: bool = False) -> Iterator[str]:
    """The URL of somebody who shows it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certfile, issued.keyfile)
    if wants_a_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(issued.certfile)
    with Quiet(("127.0.0.1", port), Plain) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()


def answers(url: str, certificate: Path | str, *, named: bool = False) -> bool:
    return served.Server(url, KEY, str(certificate), named=named).ready()


def test_the_certificate_that_the_server_says_it_shows_is_believed_and_no_other(tmp_path: Path) -> None:
    """Also one that somebody signed, whose others are not believed for that."""
    authority = Issued(tmp_path, "authority.test")
    own, signed, other = (
        Issued(tmp_path, "own.test"), Issued(tmp_path, "llm.test", authority), Issued(tmp_path, "other.test", authority)
    )  # fmt: skip
    for shown in (own, signed):
        with serving(shown) as url:
            assert answers(url, shown.certfile)
            for wrong in (other.certfile, ""):
                with pytest.raises(served.ServerError, match="CERTIFICATE_VERIFY_FAILED"):
                    answers(url, wrong)


def test_an_address_that_a_person_wrote_has_to_be_the_certificates(tmp_path: Path) -> None:
    local, elsewhere = Issued(tmp_path, "localhost"), Issued(tmp_path, "llm.test")
    with serving(local) as url:
        assert answers(url.replace("127.0.0.1", "localhost"), local.certfile, named=True)
    with serving(elsewhere) as url, pytest.raises(served.ServerError, match="Hostname mismatch"):
        answers(url.replace("127.0.0.1", "localhost"), elsewhere.certfile, named=True)


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    old, own = Issued(tmp_path, "old.test", days=-1), Issued(tmp_path, "own.test")
    with serving(old) as url, pytest.raises(served.ServerError, match="certificate has expired"):
        answers(url, old.certfile)
    with (
        serving(own, wants_a_certificate=True) as url,
        pytest.raises(served.ServerError, match=r"(?i)certificate.required|handshake.failure"),
    ):
        answers(url, own.certfile)
    with pytest.raises(served.ServerError, match=r"gone\.pem cannot be read: No such file"):
        answers("https://127.0.0.1:1", tmp_path / "gone.pem")
    with pytest.raises(served.ServerError, match=r"own\.test\.key: no certificate in it"):
        answers("https://127.0.0.1:1", own.keyfile)


def test_a_certificate_that_was_renewed_is_read_again(tmp_path: Path) -> None:
    """vLLM shows the new one without a restart (--enable-ssl-refresh)."""
    model(tmp_path / "model")
    studio = Studio(tmp_path, **QUIET)
    attachment = studio.attachment()
    announced, port = Issued(tmp_path, "llm.test"), free_port()
    url = f"https://127.0.0.1:{port}"
    attachment.on_session({"url": url, "certificate": str(announced.certfile)}, begins=True)
    with serving(announced, port):
        attachment.check(after="attach")
        assert "gave no log-probabilities" in attachment.unasked, "it has been asked, and is no vLLM"
    (tmp_path / "new").mkdir()
    renewed = Issued(tmp_path / "new", "llm.test")
    with serving(renewed, port):
        attachment._wait_until = 0.0
        attachment.check(after="attach")
        assert "CERTIFICATE_VERIFY_FAILED" in attachment.unasked
        assert attachment.must_check
        announced.certfile.write_bytes(renewed.pem)
        attachment._wait_until = 0.0
        attachment.check(after="attach")
        assert "gave no log-probabilities" in attachment.unasked
    studio.close()


def test_a_server_with_tls_announces_https_and_its_certificate(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--port", "8443", "--ssl_keyfile=key.pem", "--ssl-certfile", "cert.pem"]
    given = launch.environment(Path("s"), Path("d"), arguments, {}, base_weights=False)
    assert given[URL_VARIABLE] == "https://127.0.0.1:8443"
    assert given[CERTIFICATE_VARIABLE] == str(tmp_path / "cert.pem"), "the daemon works in another folder"
    assert launch.environment(Path("s"), Path("d"), [], {}, base_weights=False)[CERTIFICATE_VARIABLE] == ""


def test_systemd_hears_of_a_server_with_tls(tmp_path: Path) -> None:
    own, other = Issued(tmp_path, "own.test"), Issued(tmp_path, "other.test")
    with serving(own) as url:
        assert ready._healthy(url, str(own.certfile))
        assert not ready._healthy(url, str(other.certfile))
        assert not ready._healthy(url, "/nowhere.pem")


def test_the_doctor_asks_a_server_with_tls(tmp_path: Path) -> None:
    service, own = Service(tmp_path), Issued(tmp_path, "own.test")
    arguments = ["--port", str(service.port), "--ssl-keyfile", str(own.keyfile), "--ssl-certfile"]
    with serving(own, service.port) as url:
        asked = {"HOGWILD_SERVER__ARGUMENTS": json.dumps([*arguments, str(own.certfile)])}
        assert f"something else answers on {url}" in service.found("server", "fail", **asked)["found"]
        other = {
            "HOGWILD_SERVER__ARGUMENTS": json.dumps([*arguments, str(Issued(tmp_path, "b.test").certfile)])
        }
        assert "CERTIFICATE_VERIFY_FAILED" in service.found("server", "fail", **other)["found"]
    gone = {"HOGWILD_SERVER__ARGUMENTS": json.dumps([*arguments, "/nowhere/cert.pem"])}
    assert "/nowhere/cert.pem cannot be read" in service.found("server", "fail", **gone)["found"]


@pytest.mark.vllm
def test_a_server_with_tls_is_trained(tmp_path: Path) -> None:
    folder, own, port = chat_model(tmp_path / "model"), Issued(tmp_path, "llm.test"), free_port()
    sock = tmp_path / "arena.sock"
    command = [
        sys.executable, "-m", "hogwild", "vllm", str(folder), "--port", str(port), *SERVER_ARGUMENTS,
        "--ssl-keyfile", str(own.keyfile), "--ssl-certfile", str(own.certfile),
    ]  # fmt: skip
    server = Process(command, environment(HOGWILD_SOCKET=str(sock)), tmp_path / "server.log")
    daemon = Daemon(tmp_path / "daemon", sock)
    try:
        url = f"https://127.0.0.1:{port}"
        daemon.wait_for("server.attached", url=url, certificate=str(own.certfile))
        daemon.wait_for("server.verified")
        daemon.drop("a.jsonl", [{"prompt": "w1 w2", "completion": " w3", "passes": 1}])
        daemon.wait_for("example.trained")
        assert daemon.terminate() == 0
    finally:
        for process in (daemon, server):
            process.kill()
