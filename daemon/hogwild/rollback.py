"""Going back to an older generation: on disk, in the ledger, and in the weights that are being served.

    1. the generation's complete folder is made (or verified) beside the others
    2. trainers finish what they have in hand and take no more
    3. the ledger notes what is about to happen (`Intent`), durably
    4. weights and optimizer state are written in place; the server reads on meanwhile, and the weight epoch changes
       before and after, so that no answer reuses what another version computed
    5. the ledger undoes the passes, `current` leads to the generation
    6. the ledger notes that it is done; trainers go on

Up to 3 a crash changes nothing. After 3 the next start finishes it: `finish_on_disk` does step 5 again (it is
idempotent), and the next arena that is taken is written from `current`, whatever it holds. Without an arena only the
disk changes, and the next arena is written in the same way.

Which passes a generation holds, the ledger can only be told before another rollback changes what counts. So the start
also finishes a checkpoint whose folder was complete when the daemon was killed.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hogwild import generation as generations
from hogwild import log as logs
from hogwild.checkpoint import Checkpoints
from hogwild.errors import CheckpointError, HogwildError
from hogwild.keeper import Keeper
from hogwild.learner import Learner
from hogwild.ledger import Ledger, Trip

log = logs.get(__name__)

_META = "rollback"
_QUIET_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Intent:
    """A rollback that has begun and is not over.

    Attributes:
        generation: to go back to.
        left: the generation that was current.
        marker: its place in the ledger.
        retrain: what is undone is trained again.
        again: the weights were these already, so that `retrain` means what an earlier rollback to them had set aside.
        applied: ledger and `current` are done; an arena that survived may still hold the old weights.
        trip: a guard asks for it (`ledger.Trip`): what is undone is quarantined.
    """

    generation: int
    left: int
    marker: int
    retrain: bool
    again: bool = False
    applied: bool = False
    trip: dict[str, Any] | None = None


def pending(ledger: Ledger) -> Intent | None:
    """The rollback that is not over, if there is one."""
    text = ledger.get_meta(_META)
    return Intent(**json.loads(text)) if text else None


def arena_written(ledger: Ledger) -> None:
    """The arena in use holds `current`: nothing is left to be done."""
    if pending(ledger) is not None:
        ledger.set_meta(_META, "")


def finish_on_disk(ledger: Ledger, keeper: Keeper) -> None:
    """At start: finish a checkpoint or a rollback that a crash interrupted.

    Raises:
        CheckpointError: the generation of the rollback has been damaged since.
    """
    _finish_checkpoint(ledger, keeper.checkpoints)
    intent = pending(ledger)
    if intent is not None and not intent.applied:
        keeper.history.restore(intent.generation)
        undone = _apply(intent, ledger, keeper)
        log.warning("rollback.finished", **undone, reason="the daemon had ended in the middle of it")


def _finish_checkpoint(ledger: Ledger, checkpoints: Checkpoints) -> None:
    """The newest folder becomes current, and the ledger hears of it, if that is all that was left to be done."""
    number, folder = max(checkpoints.folders().items(), default=(0, Path()))
    current = checkpoints.current_generation() or 0
    try:
        state = generations.read_state(folder) if number else None
    except CheckpointError:
        return  # whoever needs it says so
    if state is None or current not in (number, state["parent"]):
        return
    if ledger.interrupted_checkpoint(number, state["ledger_position"]):
        checkpoints.point_current_at(number)
        ledger.complete_checkpoint(
            state["ledger_position"], state["step"], str(folder), generation=number, parent=state["parent"]
        )
        log.warning(
            "checkpoint.finished", generation=number, reason="the daemon had ended in the middle of it"
        )


def roll_back(
    generation: int,
    *,
    retrain: bool,
    ledger: Ledger,
    keeper: Keeper,
    learner: Learner | None,
    trip: Trip | None = None,
) -> dict[str, Any]:
    """Go back to a generation; returns what was done, for the log and for whoever asked.

    Args:
        trip: a guard asks for it: examples that lose passes are quarantined, with the evidence.
        learner: of the arena whose weights are rewritten; None: only the disk changes.

    Raises:
        CheckpointError: that generation cannot be restored, and neither can one before it; nothing has changed.
        HogwildError: the trainers do not come to rest, and nothing has changed; or something failed half-way, and
            `pending` says so: trainers are at rest, and the next start finishes it.
    """
    began = time.perf_counter()
    keeper.settle()  # first: what is being tidied away may be the folder that is wanted
    number, folder = _folder(generation, ledger, keeper)
    training = learner is not None and learner.training
    paused = time.perf_counter()
    whole = True  # weights, ledger and disk say the same
    step = None  # what the counter was when the live weights were the generation's
    try:
        if learner is not None:
            learner.pause()
            if not learner.quiet(_QUIET_TIMEOUT_S):
                raise HogwildError(f"an example is still being trained after {_QUIET_TIMEOUT_S:.0f} s")
            learner.weights.check(folder)
        state = generations.read_state(folder)
        left = keeper.checkpoints.current_generation() or 0
        marker = state["ledger_position"]
        intent = Intent(
            number, left, marker, retrain, left == number and marker == ledger.begin_checkpoint(),
            trip=None if trip is None else asdict(trip),
        )  # fmt: skip
        log.info(
            "rollback.started", generation=number, asked=generation, left=left, retrain=retrain,
            live=learner is not None, step=learner.progress.steps if learner is not None else None,
        )  # fmt: skip
        _note(ledger, intent)
        whole = False
        if learner is not None:
            learner.restore(folder)
            step = learner.progress.steps
        undone = _apply(intent, ledger, keeper)
        if learner is not None:
            arena_written(ledger)
            learner.curriculum.wake()
        whole = True
    finally:
        if learner is not None and training and whole:
            learner.start()
    done = {
        **undone,
        "asked": generation,
        "live": learner is not None,
        "step": step,
        "paused_ms": round((time.perf_counter() - paused) * 1000),
        "ms": round((time.perf_counter() - began) * 1000),
    }
    log.info("rollback.done", **done)
    return done


def _folder(generation: int, ledger: Ledger, keeper: Keeper) -> tuple[int, Path]:
    """The generation's complete folder; or that of the last good one before it."""
    if generation == 0:
        model = ledger.get_meta("base_path")
        if model:
            keeper.history.know_base(Path(model), ledger.get_meta("base_digest"))
    try:
        return generation, keeper.history.restore(generation)
    except CheckpointError as error:
        known = keeper.history.known(generation)
        good = keeper.history.last_good(generation) if known else None
        if (
            not good or good == generation
        ):  # never all the way to the model as it came, unless that was asked for
            raise
        log.error("history.fell_back", generation=generation, to=good, error=str(error))
        return good, keeper.history.restore(good)


def _apply(intent: Intent, ledger: Ledger, keeper: Keeper) -> dict[str, Any]:
    """Ledger and `current`; may be done any number of times."""
    trip = None if intent.trip is None else Trip(**intent.trip)
    reset = ledger.roll_back(intent.marker, retrain=intent.retrain, trip=trip, generation=intent.generation)
    if intent.retrain and intent.again:
        reset = replace(reset, examples_reopened=ledger.retrain())
    keeper.checkpoints.point_current_at(intent.generation)
    _note(ledger, replace(intent, applied=True))
    return {"generation": intent.generation, "left": intent.left, "retrain": intent.retrain, **asdict(reset)}


def _note(ledger: Ledger, intent: Intent) -> None:
    ledger.set_meta(_META, json.dumps(asdict(intent)))
