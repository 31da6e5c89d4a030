"""What becomes of an arena that a server offers: is it ours, whose weights does it hold, what has to be written to it.

Runs in the arena session's thread, before a learner exists. Knows the ledger and the checkpoints, not the supervisor.
"""

from dataclasses import dataclass
from pathlib import Path

from hogwild import checkpoint
from hogwild import log as logs
from hogwild.arena.client import Arena
from hogwild.checkpoint import Checkpoints
from hogwild.config import Config
from hogwild.curriculum import Curriculum
from hogwild.errors import ArenaError, VerificationError
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.weights import Weights, digest, verify_bits

log = logs.get(__name__)


@dataclass(frozen=True)
class Taken:
    """An arena that was taken over.

    Attributes:
        learner: built on it, not training yet.
        restored: the checkpoint that was written into it; None if nothing was.
    """

    learner: Learner
    restored: str | None


def take(
    arena: Arena, config: Config, ledger: Ledger, checkpoints: Checkpoints, curriculum: Curriculum
) -> Taken:
    """Verify an arena that a server offers, build the trainers on it, and bring back what was learned.

    Raises:
        HogwildError: it is refused; nothing has been written to it.
    """
    folder = Path(config.model or arena.layout.source.path)
    if arena.control.trained:
        _recognise(arena, config, ledger)
    else:
        verify_bits(Weights(arena), folder)
    learner = Learner(arena, folder, config, ledger, curriculum)
    restored = None
    if arena.control.trained:
        _resume(learner, checkpoints)
    else:
        restored = _restore(learner, checkpoints)
    ledger.set_meta("arena_id", arena.control.arena_id)
    learner.write_own_texts(config.state_dir / "selfreplay.json", ledger.get_meta("base_digest") or "")
    return Taken(learner, restored)


def _recognise(arena: Arena, config: Config, ledger: Ledger) -> None:
    """An arena that has been trained is taken back only by the daemon that trained it."""
    if ledger.get_meta("arena_id") != arena.control.arena_id:
        raise ArenaError(
            "the server's weights were trained by a daemon with another state folder than "
            f"{config.state_dir}. Start that daemon again, or restart the server to begin from the checkpoint."
        )
    if config.model and Path(config.model).resolve() != Path(arena.layout.source.path):
        raise ArenaError(
            f"the server's weights were loaded from {arena.layout.source.path}, "
            f"`model` is now {config.model}: set it back, or restart the server on that model"
        )


def _resume(learner: Learner, checkpoints: Checkpoints) -> None:
    """An arena that outlived the last daemon: its weights are ahead of any checkpoint, its moments are gone.

    The newest checkpoint's moments take their place: exact after a graceful stop, a little old after a crash.
    """
    current = checkpoints.current()
    if current is not None:
        learner.load_optimizer(checkpoint.read_optimizer(current))


def _restore(learner: Learner, checkpoints: Checkpoints) -> str | None:
    """A fresh arena: bring back the newest checkpoint, and queue again what is in no checkpoint."""
    ledger, config = learner.ledger, learner.config
    base = digest(learner.folder)
    known = ledger.get_meta("base_digest")
    if known not in (None, base):
        raise VerificationError(
            "the model is not the one that this state folder has learned on",
            [f"{config.state_dir} belongs to {ledger.get_meta('base_path')} (digest {known}), "
             f"{learner.folder} has digest {base}: give another state_dir, or serve that model"],
        )  # fmt: skip
    ledger.set_meta("base_digest", base)
    ledger.set_meta("base_path", str(learner.folder))
    current = checkpoints.current()
    if current is not None:
        state = checkpoint.read_state(current)
        if state["ledger_position"] > ledger.durable_marker():  # killed between the two
            ledger.complete_checkpoint(state["ledger_position"], state["step"], str(current))
        learner.restore(current)
    undone = ledger.reset_to_durable(None if current is not None else 0)
    if undone.passes_undone:
        log.warning(
            "ledger.requeued",
            passes=undone.passes_undone,
            examples=undone.examples_reopened,
            reason="the weights that they were trained into are gone",
        )
    return str(current) if current is not None else None
