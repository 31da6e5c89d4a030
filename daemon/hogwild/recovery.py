"""What becomes of an arena that a server offers: is it ours, whose weights does it hold, what has to be written to it.

    the arena                                    what is done
    -------------------------------------------  ------------------------------------------------------------------
    holds the model as it came                   every bit compared with the model's files; the newest checkpoint is
                                                 written into it, and what is in no checkpoint is queued again
    filled by the server from a checkpoint       every bit compared with that checkpoint; nothing is written, unless
                                                 `current` leads to another one by now
    trained by us, as far as the ledger knows    kept as it is: it is newer than any checkpoint
    trained by us, further than the ledger knows not trusted: written anew from the newest checkpoint
    left in the middle of a restore              the same
    trained by us, and a rollback is not over    the same
    trained by another state folder              refused
    of another model than we have learned        refused

Runs in the arena session's thread, before a learner exists. Knows the ledger and the checkpoints, not the supervisor.
docs/crashes.md says what each message means.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hogwild import checkpoint, generation, rollback, streams
from hogwild import log as logs
from hogwild.arena.client import Arena
from hogwild.checkpoint import Checkpoints
from hogwild.curriculum import Curriculum
from hogwild.errors import ArenaError, CheckpointError, VerificationError
from hogwild.learner import RESTORED, Learner
from hogwild.ledger import Ledger
from hogwild.plural import counted
from hogwild.resume import newest_checkpoint
from hogwild.settings import Config
from hogwild.spool_files import user
from hogwild.weights import Weights, digest, verify_bits

log = logs.get(__name__)


@dataclass(frozen=True)
class Taken:
    """An arena that was taken over.

    Attributes:
        learner: built on it, not training yet.
        restored: the checkpoint whose weights it holds now; None: the model as it came, or what it was trained to.
        repeated: steps that are in the weights and not in the ledger: their passes are done again.
        saved_step: what the step counter was when the weights were those of the newest checkpoint.
    """

    learner: Learner
    restored: str | None
    repeated: int
    saved_step: int


def take(
    arena: Arena, config: Config, ledger: Ledger, checkpoints: Checkpoints, curriculum: Curriculum
) -> Taken:
    """Verify an arena that a server offers, build the trainers on it, and bring back what was learned.

    Raises:
        HogwildError: it is refused; nothing has been written to it, or it is marked as half-written.
    """
    folder = Path(config.model or arena.layout.source.path)
    if not os.access(folder / "config.json", os.R_OK):
        raise ArenaError(
            f"{folder}, which the server's weights came from, is not there, or user {user()} may not read it: "
            "bring it back, or mend its permissions"
        )
    current = newest_checkpoint(checkpoints.root)
    _compare_with_ledger(current, ledger, checkpoints.root)
    keep, write, repeated = False, True, 0
    if arena.control.trained or arena.control.restoring:
        _recognise(arena, config, ledger)
        repeated = _ahead(arena, ledger)
        doubt = _doubt(arena, repeated, ledger)
        if doubt is None and (intent := rollback.pending(ledger)) is not None:
            doubt = f"generation {intent.generation} was rolled back to, and these weights may be of another"
        keep = doubt is None
        if doubt is not None:
            log.warning("arena.stale", arena=arena.control.arena_id, reason=doubt, step=arena.control.steps)
            repeated = 0
    elif arena.layout.checkpoint:
        write = not _holds(arena, current, config)
    else:
        verify_bits(Weights(arena), folder)
    learner = Learner(arena, folder, config, ledger, curriculum)
    try:
        if keep:
            _resume(learner, current)
        else:
            _belongs_to_this_model(learner)
            _restore(learner, current, write)
        learner.claim()
        rollback.arena_written(ledger)
        base = ledger.get_meta("base_digest") or ""
        learner.write_own_texts(config.state_dir / "selfreplay.json", base)
        saved = generation.read_state(current) if current is not None else None
        saved_step = _saved_step(learner, saved) if keep else learner.progress.steps
        learner.judge.prepare(config.state_dir / "probes.json", base, saved, learner.encoder.sequences)
    except BaseException:
        learner.stop(0)  # it may be writing texts of the model's own
        raise
    return Taken(learner, str(current) if current is not None and not keep else None, repeated, saved_step)


# --- what the arena is -----------------------------------------------------------------------------------------------


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


def _ahead(arena: Arena, ledger: Ledger) -> int:
    """Steps that this arena has made and the ledger does not know of.

    A step is counted on the control page when its update is done, and recorded after that: a daemon that is killed
    between the two leaves at most one such step for each of its trainer threads.
    """
    since, after, without_pass = (
        int(ledger.get_meta(key) or 0) for key in ("arena_steps", "arena_pass", "arena_steps_without_pass")
    )
    recorded = ledger.steps_recorded(arena.control.arena_id, after) + without_pass
    return arena.control.steps - since - recorded


def _doubt(arena: Arena, ahead: int, ledger: Ledger) -> str | None:
    """Why the weights of an arena of ours cannot be gone on with; None if they can."""
    if arena.control.restoring:
        return "a checkpoint was being written into it when the daemon ended"
    threads = int(ledger.get_meta("arena_threads") or 0)
    if ahead > threads:
        return (
            f"it has made {counted(ahead, 'step')} that the ledger does not know of, and a crash leaves {threads} "
            "at most: the ledger is older than these weights"
        )
    if ahead < 0:
        return f"the ledger knows {counted(-ahead, 'step')} that it has not made"
    return None


def _holds(arena: Arena, current: Path | None, config: Config) -> bool:
    """Does an arena that the server filled from a checkpoint hold `current`?

    Raises:
        VerificationError: it does not hold what the server says, or that is not ours.
    """
    filled = Path(arena.layout.checkpoint)
    if filled.parent != (config.state_dir / "checkpoints").resolve():
        raise VerificationError(
            "the server started from a checkpoint of another state folder",
            [f"it serves {filled}, this daemon works in {config.state_dir}: start `hogwild vllm` and "
             "`hogwild serve` with the same state_dir"],
        )  # fmt: skip
    if filled.is_dir():
        verify_bits(Weights(arena), filled)
    else:  # a rollback or a newer daemon has taken it away since; what is written now is checked against the server
        log.warning("arena.unverified", arena=arena.control.arena_id, checkpoint=str(filled))
    return filled == current


def _compare_with_ledger(current: Path | None, ledger: Ledger, root: Path) -> None:
    """Checkpoints and ledger have to be of one and the same state folder.

    Raises:
        CheckpointError: one of the two is older than the other, or gone.
    """
    newest_pass = ledger.newest_pass()
    if current is None:
        if ledger.durable_marker() > 0:
            raise CheckpointError(
                f"the ledger knows of a checkpoint, but there is none in {root}. Mount or copy back that folder; or, "
                "to learn everything again from the model as it came, start with an empty state_dir and drop the "
                "files of the spool's done/ again."
            )
        return
    position = checkpoint.read_state(current)["ledger_position"]
    if position > newest_pass:
        raise CheckpointError(
            f"{current} holds passes up to number {position}, the ledger knows {newest_pass}: {ledger.path} is an "
            "older copy. Bring back the ledger that belongs to this checkpoint, or the checkpoints that belong to "
            "this ledger."
        )


def _belongs_to_this_model(learner: Learner) -> None:
    """The model is the one that this state folder has learned on; the first one makes it so.

    Raises:
        VerificationError: it is another one.
    """
    ledger = learner.ledger
    base = digest(learner.folder)
    known = ledger.get_meta("base_digest")
    if known not in (None, base):
        raise VerificationError(
            "the model is not the one that this state folder has learned on",
            [f"{learner.config.state_dir} belongs to {ledger.get_meta('base_path')} (digest {known}), "
             f"{learner.folder} has digest {base}: give another state_dir, or serve that model"],
        )  # fmt: skip
    ledger.set_meta("base_digest", base)
    ledger.set_meta("base_path", str(learner.folder))


# --- what is done with it --------------------------------------------------------------------------------------------


def _resume(learner: Learner, current: Path | None) -> None:
    """An arena that outlived the last daemon: its weights are ahead of any checkpoint, its moments are gone.

    The newest checkpoint's moments take their place: exact after a graceful stop, a little old after a crash.
    """
    if current is not None:
        learner.load_moments(current)
        # It may have become current after the last daemon had ended, see `rollback.finish_on_disk`.
        learner.arena.control.generation = generation.read_state(current)["generation"]


def _saved_step(learner: Learner, saved: dict[str, Any] | None) -> int:
    """Of an arena that is kept. The counter only grows, so after a rollback it is ahead of the generation's own step.

    Args:
        saved: state of the newest checkpoint.
    """
    if saved is None:
        return 0
    arena, generation_, step = json.loads(learner.ledger.get_meta(RESTORED) or '["", 0, 0]')
    here = (arena, generation_) == (learner.arena.control.arena_id, saved["generation"])
    return int(step if here else saved["step"])


def _restore(learner: Learner, current: Path | None, write: bool) -> None:
    """Bring back the newest checkpoint, and queue again what is in no checkpoint.

    Args:
        write: False: its weights are in the arena already.
    """
    ledger, control, position = learner.ledger, learner.arena.control, 0

    def requeue() -> None:
        """Before the arena is trusted: a kill after that would leave passes counted that it lacks."""
        undone = ledger.reset_to_durable(position)
        if undone.passes_undone:
            log.warning(
                "ledger.requeued",
                passes=undone.passes_undone,
                examples=undone.examples_reopened,
                reason="the weights that they were trained into are gone",
            )

    if current is not None:
        state = checkpoint.read_state(current)
        if state["ledger_position"] > ledger.durable_marker():  # killed between the two
            ledger.complete_checkpoint(
                state["ledger_position"],
                state["step"],
                str(current),
                generation=state["generation"],
                parent=state["parent"],
            )
        position = state["ledger_position"]
        if write:
            learner.restore(current, requeue)
        else:
            learner.load_moments(current)
            learner.progress.resume(state["step"], state["epoch"])
            requeue()
    elif control.trained or control.restoring:  # an arena that nothing but the model itself can mend
        learner.claim()
        with control.rewriting():
            learner.weights.write(learner.folder)
            streams.settle(learner.arena.weights.device)
            control.generation = 0
            requeue()
    else:
        requeue()
