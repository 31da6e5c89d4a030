"""What is done when the probes have fallen: back to the last good generation, and on with the rest.

    1. training has stopped already (`judge.py`)
    2. the good generation's weights are written into the live ones; the examples that were trained since are
       quarantined, with their losses (`rollback.py`)
    3. the probes are scored again: if that generation is no better, the one before it takes its place, and so on
    4. what is left of a file that was in the window several times is quarantined too
    5. training goes on

Nothing restarts, and the server serves on.
"""

from typing import Any

from hogwild import generation as generations
from hogwild import log as logs
from hogwild import metrics, rollback
from hogwild.errors import CheckpointError, HogwildError
from hogwild.keeper import Keeper
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.probes import Score

log = logs.get(__name__)

_SAID = 50  # examples that one line of the log names; `hogwild quarantine` lists all


def go_back(ledger: Ledger, keeper: Keeper, learner: Learner, *, go_on: bool) -> dict[str, Any]:
    """Undo the damage that the probes have found; returns what was done.

    Args:
        go_on: train the rest.

    Raises:
        HogwildError: no generation could be gone back to. Training has stopped, and stays so.
    """
    judge = learner.judge
    trip, good = judge.tripped, judge.probes.good
    if trip is None or good is None:
        raise HogwildError("nothing has fallen, or there is nothing to go back to")
    before = {suspect.example_id for suspect in ledger.guards.suspects()}
    while True:
        done = rollback.roll_back(
            good.generation, retrain=False, ledger=ledger, keeper=keeper, learner=learner, trip=trip
        )
        metrics.rollbacks.labels(by="probes").inc()
        good = judge.probes.good or good
        score = judge.score()
        worse = judge.compare(score, good)
        if not worse or not done["generation"]:
            break
        parent = _parent(keeper, done["generation"])
        log.warning("guard.went_on_back", generation=done["generation"], to=parent, probes=worse)
        good = judge.probes.of_state(_state(keeper, parent)) or type(good)(parent, good.losses)
    rest = ledger.guards.rest_of_files(
        learner.config.guard.file_trips, "set aside by probes: they fell again and again with its file"
    )
    _say(ledger, before, rest, done)
    judge.tripped = None
    learner.curriculum.wake()
    log.info("guard.recovered", generation=done["generation"], probes=_rounded(score), fallen=worse)
    if go_on:
        learner.start()
    return done


def _say(ledger: Ledger, before: set[int], rest: dict[str, int], done: dict[str, Any]) -> None:
    """Name the culprits."""
    suspects = [one for one in ledger.guards.suspects() if one.example_id not in before]
    files: dict[str, int] = {}
    for one in suspects:
        files[one.file] = files.get(one.file, 0) + 1
    log.warning(
        "guard.set_aside",
        generation=done["generation"],
        count=len(suspects),
        files=files,
        rest_of_files=rest,
        examples=[
            {"id": one.name or str(one.example_id), "file": one.file, "line": one.line_no}
            for one in suspects[:_SAID]
        ],
        again="hogwild quarantine --retrain",
    )


def _state(keeper: Keeper, generation: int) -> dict[str, Any]:
    if generation == 0:
        return {"generation": 0}
    try:
        return generations.read_state(keeper.history.restore(generation))
    except CheckpointError:
        return {"generation": generation}


def _parent(keeper: Keeper, generation: int) -> int:
    parent = _state(keeper, generation).get("parent")
    return parent if isinstance(parent, int) else 0


def _rounded(score: Score) -> dict[str, float]:
    return {name: round(loss, 4) for name, loss in score.losses.items()}
