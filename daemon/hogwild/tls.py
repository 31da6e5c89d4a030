"""Which certificates are believed when a server is asked over https."""

import re
import ssl
from pathlib import Path

_FIRST = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def context(certificate: str, *, named: bool) -> ssl.SSLContext:
    """For a client of one server.

    A server that announces where it answers is on this machine, and no certificate is issued for 127.0.0.1: exactly
    the one that it says it shows is believed, whatever name is in it and whoever signed it.

    Args:
        certificate: file with the one that the server shows (PEM, and what signed it may follow); empty: it says
            nothing of one.
        named: a person wrote the address: its name has to be in the certificate, and those that the machine believes
            are good, too.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no certificate.
    """
    found = ssl.create_default_context() if named else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    found.check_hostname = named
    if certificate:
        shown = _FIRST.search(Path(certificate).read_text("ascii", errors="replace"))
        if shown is None:
            raise ValueError(f"{certificate}: no certificate in it")
        found.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # itself, without whoever signed it
        found.load_verify_locations(cadata=shown[0])
    return found


def failed(error: BaseException | None) -> str:
    """Why encryption did not come about, where that is what lies beneath an error; empty: it is not."""
    while error is not None and not isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)  # urllib's
        error = reason if isinstance(reason, BaseException) else error.__cause__ or error.__context__
    return str(error) if error is not None else ""
