"""Whether incoming/ is the folder that this ledger knows.

When its disk is not mounted, an empty folder (or none) is at the path. Making a new spool there would take
files from the wrong disk and hide the real ones. So incoming/ carries an identity in a file of its own, and the
ledger remembers it:

    the file is there and right         go on; missing folders inside are made again
    it is missing, on the same disk     somebody removed or replaced the folder: make it anew, and say so
    it is missing, on another disk      not mounted: refuse and say so, until it is back
    it is another spool's               refuse and say so
    another path is configured          that is a new spool: give it an identity
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from hogwild import log
from hogwild.errors import SpoolError
from hogwild.ledger import Ledger
from hogwild.spool_files import fsync_folder, make_folders, user

MARK = ".hogwild-spool"
_META = "spool"

logger = log.get(__name__)


def verify(
    incoming: Path, others: Sequence[Path], ledger: Ledger, hold: Callable[[], None] = lambda: None
) -> None:
    """Makes sure that the spool's folders are there and that incoming/ is what it was.

    Args:
        hold: called once it is the folder that it should be, before anything is written in it; may raise SpoolError.

    Raises:
        SpoolError: a folder cannot be made or used (naming it and the user), or is not the spool that it was.
    """
    known = json.loads(ledger.get_meta(_META) or "null")
    if known is not None and known["path"] != str(incoming):
        known = None
    mark = _read(incoming / MARK)
    device = _device(incoming)
    if known is not None and mark != known["id"]:
        repair = (
            f"Nothing is taken from it. Mount it again; or, to make this folder the spool from now on:"
            f" echo {known['id']} > {incoming / MARK}"
        )
        if mark is not None:
            raise SpoolError(
                f"{incoming}: is the folder of another spool than the one that this ledger knows. {repair}"
            )
        if device != known["device"]:
            raise SpoolError(
                f"{incoming}: is on another file system than it was: is it not mounted? {repair}"
            )
        logger.warning("spool.recreated", folder=str(incoming), reason="it was removed or replaced")
    make_folders([incoming, *others])
    hold()
    for other in others:
        if _device(other) != _device(incoming):
            raise SpoolError(
                f"{other}: is on another file system than {incoming}: files cannot be moved there"
            )
    if known is None or mark is None:
        identity = known["id"] if known is not None else mark or uuid.uuid4().hex
        if mark is None:
            _write(incoming / MARK, identity)
        ledger.set_meta(
            _META, json.dumps({"path": str(incoming), "id": identity, "device": _device(incoming)})
        )
    elif known["device"] != device:  # the same disk under another number, as after a reboot
        ledger.set_meta(_META, json.dumps({**known, "device": device}))


def _read(mark: Path) -> str | None:
    try:
        return mark.read_text("utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SpoolError(f"{mark}: user {user()} cannot read it: {error.strerror}") from error


def _write(mark: Path, identity: str) -> None:
    temporary = mark.with_name(f"{MARK}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x") as file:
            file.write(f"{identity}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(mark)
        fsync_folder(mark.parent)
    except OSError as error:
        raise SpoolError(f"{mark}: user {user()} cannot write it: {error.strerror}") from error


def _device(folder: Path) -> int:
    """Of the file system that the folder is on, or would be on if it were made."""
    while True:
        try:
            return folder.stat().st_dev
        except FileNotFoundError:
            folder = folder.parent
        except OSError as error:
            raise SpoolError(f"{folder}: user {user()} cannot look at it: {error.strerror}") from error
