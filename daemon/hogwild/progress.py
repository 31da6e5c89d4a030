"""Something that moves while a command takes long: on a terminal, on stderr. Imports no torch."""

import contextlib
from collections.abc import Iterator

from hogwild import files


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """A bar with the bytes that this thread has written to files, and how fast."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        FileSizeColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    amounts = (FileSizeColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        with files.reporting(lambda nbytes: bar.advance(task, nbytes)):
            yield


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A mark that turns, for what another process does."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield
