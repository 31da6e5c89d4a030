"""Tells systemd how a service is: datagrams of KEY=value lines to $NOTIFY_SOCKET (see sd_notify(3)). Imports no torch.

Own code, because it is a page: the `sdnotify` package was last released in 2017 and knows no watchdog, and
`systemd-python` wants a compiler and libsystemd's headers. Outside systemd every call does nothing.
"""

import os
import socket
import time
from collections.abc import Mapping

_TIMEOUT_S = 1.0  # a full queue of systemd's must not hold up whoever reports


class Notifier:
    """What systemd asked this process to report to.

    Attributes:
        watchdog_s: seconds within which systemd wants to hear WATCHDOG=1; None: it does not.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        period, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        mine = pid in ("", str(os.getpid()))
        self.watchdog_s = int(period) / 1e6 if self._address and mine and period.isdigit() else None

    @property
    def listening(self) -> bool:
        """Is there anybody to tell?"""
        return bool(self._address)

    def send(self, *lines: str) -> bool:
        """Send one datagram; "STATUS=..." may hold any text. False: nobody got it, which is no reason to stop."""
        if not self._address:
            return False
        message = "\n".join(line.replace("\n", " ") for line in lines)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_TIMEOUT_S)
                sock.connect(self._address)
                sock.sendall(message.encode())
        except OSError:
            return False
        return True

    def ready(self, status: str) -> None:
        """Started, or reloaded."""
        self.send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Settings are read again; `ready` follows."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
