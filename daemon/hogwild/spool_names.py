"""What the spool's files are called: the name that a file gets in done/ or failed/, and what its own asks for."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from hogwild.ledger import Ledger
from hogwild.spool_files import printable
from hogwild.spool_read import Candidate

FORCE = ".force."
"""In a file's name: learn it although the same content was learned before."""
ERRORS = ".errors.jsonl"
"""What failed/ adds to the name of a file whose bad lines it lists."""
NAME_BYTES = 220  # of 255: <name>.errors.jsonl and its temporary name must fit


def choose(batch: Sequence[Candidate], ledger: Ledger, folders: Sequence[Path]) -> None:
    """Gives each a name that is free in done/ and failed/: its own, or one with part of the content's hash.

    Args:
        folders: done/ and failed/, for files there that the ledger does not know: somebody's own.
    """
    for one in batch:
        name = one.name
        if name.endswith(ERRORS):  # failed/<name> is where another file's bad lines are written down
            name = f"{name.removesuffix('.jsonl')}.{one.digest[:8]}.jsonl"
        one.stored_as = _shortened(name, one.digest)
    taken = ledger.names_taken([one.stored_as for one in batch])
    for one in batch:
        if one.stored_as in taken or _lies_in(folders, one.stored_as):
            one.stored_as = _another(one, taken, ledger, folders)
        taken.add(one.stored_as)


def _another(one: Candidate, taken: Collection[str], ledger: Ledger, folders: Sequence[Path]) -> str:
    stem, dot, suffix = one.stored_as.partition(".jsonl")

    def name(number: int) -> str:
        return f"{stem}.{one.digest[:8]}{f'.{number}' if number > 1 else ''}{dot}{suffix}"

    def is_taken(number: int) -> bool:
        wanted = name(number)
        return wanted in taken or _lies_in(folders, wanted) or bool(ledger.names_taken([wanted]))

    return name(_first_free(is_taken))


def _lies_in(folders: Sequence[Path], name: str) -> bool:
    return any(os.path.lexists(f"{folder}/{name}") for folder in folders)


def _first_free(is_taken: Callable[[int], bool]) -> int:
    """A number that is free, and the one before it is not: in few looks, although somebody may have dropped the same
    file every minute for months."""
    free = 1
    while is_taken(free):
        free *= 2
    last_taken = free // 2
    while free - last_taken > 1:
        middle = (free + last_taken) // 2
        if is_taken(middle):
            last_taken = middle
        else:
            free = middle
    return free


def list_errors(failed: Path) -> list[str]:
    """Names of the files whose bad lines are listed in failed/."""
    names = [entry.name for entry in os.scandir(failed)]
    return [printable(name.removesuffix(ERRORS)) for name in names if name.endswith(ERRORS)]


def printed_like(incoming: Path, name: str) -> Iterator[str]:
    """Names in incoming/ that may be printed as `name`; all, where bytes that are not UTF-8 were replaced in it."""
    if os.path.lexists(incoming / name):
        yield name
    elif "\ufffd" in name:
        yield from (entry.name for entry in os.scandir(incoming))


def _shortened(name: str, digest: str) -> str:
    if len(name.encode()) <= NAME_BYTES:
        return name
    stem, dot, suffix = name.rpartition(".jsonl")
    room = NAME_BYTES - len(f".{digest[:8]}{dot}{suffix}".encode())
    return f"{stem.encode()[:room].decode('utf-8', 'ignore')}.{digest[:8]}{dot}{suffix}"
