"""Does systemd's journal read what this process writes? Then every line is JSON. Imports no torch."""

import os
import sys


def is_stderr() -> bool:
    """$JOURNAL_STREAM names the device and inode of the stream that systemd connected (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no stderr, or not a real one
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))
