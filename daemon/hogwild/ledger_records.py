"""What goes into the ledger and what comes out of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hogwild.examples import Example, parse_line

GuardName = Literal["probes", "loss", "update", "growth", "crash"]
State = Literal["accepted", "trained", "durable", "failed", "undone", "quarantined"]


class GoodLine(NamedTuple):
    line_no: int
    byte_offset: int
    raw: bytes
    example: Example


class BadLine(NamedTuple):
    """`line_no` 0 means the whole file."""

    line_no: int
    byte_offset: int
    field: str | None
    reason: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class NewFile:
    """A small file, read to its end."""

    name: str
    content_hash: str
    bytes: int
    """On disk, compressed or not."""
    content_bytes: int
    """Decompressed."""
    stored_as: str
    force: bool
    """Accept it although the same content was accepted before."""
    lines: Sequence[GoodLine | BadLine]


@dataclass(frozen=True, slots=True)
class Growing:
    """A file that was taken while somebody may still have had it open for writing."""

    file_id: int
    """That has its lines: of a duplicate, the file that came first."""
    name: str
    stored_as: str
    content_hash: str
    bytes: int
    content_bytes: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    file_id: int
    name: str
    content_hash: str
    bytes: int
    state: Literal["accepted", "rejected"]
    stored_as: str
    """Its name in done/, or in failed/ if it was rejected."""
    moved: bool
    accepted_at: str
    pending: int
    trained: int
    durable: int
    failed: int
    rejected: int
    """Bad lines."""
    undone: int = 0
    quarantined: int = 0

    @property
    def examples(self) -> int:
        return self.pending + self.trained + self.durable + self.failed + self.undone + self.quarantined


@dataclass(frozen=True, slots=True)
class Pending:
    """An example that wants another pass."""

    example_id: int
    file: str
    line_no: int
    name: str | None
    """The line's own "id"."""
    line: str
    passes_done: int
    passes: int
    until_loss: float | None
    last_step: int | None = None
    """The training step of its newest pass that counts."""
    crashes: int = 0
    """Times that the daemon ended in a step with it, since the last that came to its end."""

    def example(self) -> Example:
        return parse_line(self.line.encode())

    @property
    def who(self) -> dict[str, Any]:
        """As the log names it."""
        return {"id": self.name or str(self.example_id), "file": self.file, "line": self.line_no}


@dataclass(frozen=True, slots=True)
class Pass:
    """One example moved the weights once. Losses are means in nats per trained token."""

    example_id: int
    loss_before: float
    loss_after: float | None
    """None: not measured; `until_loss` then looks at the loss before."""
    tokens: int
    step: int
    thread: int
    arena_id: str
    replay: bool = False
    """An example that was learned before, mixed into a step: its state and its passes stay as they are."""


@dataclass(frozen=True, slots=True)
class Outcome:
    example_id: int
    state: State
    passes_done: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Examples by state; bad lines; files; passes that count."""

    pending: int
    trained: int
    durable: int
    failed: int
    rejected: int
    files: int
    passes: int
    undone: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """What going back to other weights changed."""

    passes_undone: int
    """That are no longer in the weights."""
    examples_reopened: int
    """To be trained again."""
    examples_undone: int = 0
    """That lost passes and stay out (undone, quarantined) until `retrain`."""
    passes_redone: int = 0
    """That an earlier rollback had undone, and that the weights hold again."""


@dataclass(frozen=True, slots=True)
class Trip:
    """A guard that has stopped something: what it was, and what it measured."""

    guard: GuardName
    step: int
    about: dict[str, Any]
    """JSON."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """An example that a guard has set aside."""

    example_id: int
    file: str
    line_no: int
    name: str | None
    """The line's own "id"."""
    guard: str
    at: str
    """UTC."""
    reason: str
    about: dict[str, Any]
    """The evidence: losses, update norms, steps."""
    step: int
    """Training steps done when the guard stopped something."""
    measured: dict[str, Any]
    """By the guard. Of the probes that have fallen: {set: {"was", "is", "margin"}}, nats a token."""
    first_loss: float | None
    """Before the example's first pass, nats a token; None: it had none, or it was not a number."""
    last_loss: float | None
    """After its newest pass, or before that where it was not measured after it."""


def selection(state: str, example_ids: Sequence[int] | None, file: str | None) -> tuple[str, list[str]]:
    """SQL that chooses examples in a state, and its arguments.

    Args:
        example_ids: only these.
        file: only those of files that were dropped under this name.
    """
    chosen, arguments = ["state = ?"], [state]
    if example_ids is not None:
        chosen.append("example_id IN (SELECT value FROM json_each(?))")
        arguments.append(json.dumps(list(example_ids)))
    if file is not None:
        chosen.append("file_id IN (SELECT file_id FROM files WHERE name = ?)")
        arguments.append(file)
    return " AND ".join(chosen), arguments
