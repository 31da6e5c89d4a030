"""What can go wrong, as a tree. Every message says what, where and what to do.

HogwildError                 exit 1
├── ConfigError              exit 78 (EX_CONFIG: systemd must not restart on it)
├── UsageError               exit 2
├── ArenaError               shared memory or its hand-over failed
│   ├── ProtocolError        a peer spoke out of turn, or is not who it should be
│   ├── UnshareableError     a GPU or its driver cannot share memory in the way that was asked for
│   └── VerificationError    the arena does not hold this model; carries every problem found
├── ExampleError             one line of a spool file cannot be trained
├── LedgerError              the ledger cannot be opened, or is not one
│   └── AlreadyAccepted      the same content was accepted before
├── SpoolError               the spool folder cannot be used
│   └── SpoolTakenError      another daemon takes files from it
├── LossError                a training step was refused before anything was written
└── CheckpointError          a checkpoint could not be written or read
"""

from collections.abc import Sequence


def in_short(error: BaseException) -> str:
    """Its type and what it says. Not its repr: of bytes that are no UTF-8, that holds all of them."""
    return f"{type(error).__name__}: {error}"


class HogwildError(Exception):
    """Base of all errors that are meant for a person to read."""

    exit_code = 1


class ConfigError(HogwildError):
    """The configuration is wrong; restarting will not help."""

    exit_code = 78


class UsageError(HogwildError):
    """The command line is wrong."""

    exit_code = 2


class ArenaError(HogwildError):
    """The shared memory could not be made, mapped or handed over."""


class ProtocolError(ArenaError):
    """The peer on the socket sent something that the protocol does not allow."""


class UnshareableError(ArenaError):
    """The device or its driver cannot make, export or map shareable memory in this way. Another way may do."""


class VerificationError(ArenaError):
    """The arena is not what the trainer expects. Lists every problem at once; nothing has been written."""

    def __init__(self, summary: str, problems: Sequence[str]) -> None:
        self.summary = summary
        self.problems = list(problems)
        super().__init__("\n  - ".join([f"{summary} ({len(self.problems)} found):", *self.problems]))


class ExampleError(HogwildError):
    """A line cannot become a training example.

    Args:
        reason: what is wrong and what would be right.
        field: the JSON field at fault, if one is.
    """

    def __init__(self, reason: str, field: str | None = None) -> None:
        self.reason = reason
        self.field = field
        super().__init__(f"{field}: {reason}" if field else reason)


class LedgerError(HogwildError):
    """The ledger cannot be used."""


class AlreadyAccepted(LedgerError):  # noqa: N818  # not a fault: the caller answers it politely
    """A file with the same content is in the ledger already.

    Args:
        name: the file's name when it was accepted.
        accepted_at: ISO 8601 UTC.
    """

    def __init__(self, file_id: int, name: str, accepted_at: str) -> None:
        self.file_id = file_id
        self.name = name
        self.accepted_at = accepted_at
        super().__init__(f"the same content was accepted as {name} at {accepted_at}")


class SpoolError(HogwildError):
    """The spool folder cannot be used. Names the path and the user."""


class SpoolTakenError(SpoolError):
    """Another daemon takes files from the spool folder."""


class LossError(HogwildError):
    """The loss of a training step is not finite, or far too large: no weight has been touched."""


class CheckpointError(HogwildError):
    """A checkpoint could not be written, or one on disk is not complete."""
