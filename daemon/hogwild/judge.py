"""Scores the probes when it is time, and stops training when they have fallen."""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hogwild import log as logs
from hogwild import metrics, pulse, rope
from hogwild import probes as probing
from hogwild.arena.control import ControlPage
from hogwild.examples import Encoded, Example
from hogwild.ledger import Ledger, Trip
from hogwild.preparation import Preparation
from hogwild.probes import Good, Probes, Score
from hogwild.settings import ProbesConfig
from hogwild.trainer import Progress

log = logs.get(__name__)

_META = "probes_base"  # scores of the model as it came, which has no state.json


class Judge:
    """The probes of one learner. Called by its threads, and by whoever saves.

    Args:
        model: for reading only.
        pause: lets the trainers take no further example.
        ensure_alive: asked before anything follows from what was read of the weights, see `Held.ensure_alive`.

    Attributes:
        tripped: the probes have fallen, and nobody has gone back yet (`trips.py` does).
    """

    def __init__(
        self,
        config: ProbesConfig,
        model: PreTrainedModel,
        ledger: Ledger,
        progress: Progress,
        control: ControlPage,
        preparation: Preparation,
        pause: Callable[[], None],
        ensure_alive: Callable[[], None],
    ) -> None:
        self.probes, self.progress = Probes(config, rope.fingerprint(model)), progress
        self._model, self._ledger, self._control = model, ledger, control
        self._preparation, self._pause = preparation, pause
        self.ensure_alive = ensure_alive
        self._scoring, self._beginning = threading.Lock(), threading.Lock()
        self.tripped: Trip | None = None

    def prepare(
        self,
        path: Path,
        base: str,
        saved: Mapping[str, Any] | None,
        encode: Callable[[Example], Sequence[Encoded]],
    ) -> None:
        """Read the probes of the configuration, load or make the model's own, and find out what to hold them against.

        Args:
            path: the file that keeps the model's own.
            base: digest of the model as it came.
            saved: state.json of the generation that these weights descend from; None: the model as it came.

        Raises:
            ConfigError: `probes.file` is wrong.
        """
        config = self.probes.config
        if config.file != Path():
            self.probes.sets["file"] = probing.read(config.file, encode)

        def prepare() -> None:
            if config.own and (own := self._preparation.own_probes(path, base, step=self.progress.steps)):
                self.probes.sets["own"] = own
            self.hold_against(saved)

        self._preparation.begin(prepare)

    def hold_against(self, saved: Mapping[str, Any] | None) -> None:
        """From now on the probes are compared with that generation's. What it does not say is measured in time."""
        self.probes.good = self.probes.of_state(saved) if saved is not None else None
        if self.probes.good is None and self._control.generation == 0:
            self.probes.good = self.probes.of_state(self._as_it_came())

    def went_back(self, saved: Mapping[str, Any]) -> None:
        """The weights are that generation's."""
        self.hold_against(saved)
        self.probes.went_back(saved if saved["generation"] else {**saved, **self._as_it_came()})

    def _as_it_came(self) -> dict[str, Any]:
        """What state.json would say of the model as it came, if it had one."""
        return {"generation": 0, **json.loads(self._ledger.get_meta(_META) or "{}")}

    def start_over(self) -> None:
        """The model computes otherwise than before, with the same weights: what its probes were means nothing now."""
        self.probes.frequencies = rope.fingerprint(self._model)
        self.hold_against(None)

    def begin(self) -> None:
        """Before anything is trained: know what the probes were."""
        if self.probes.enabled and self.probes.good is None:
            with pulse.away(), self._beginning:
                if self.probes.good is None:
                    self.score()

    def look(self) -> None:
        """After a step: judge, if it is time."""
        if self.probes.due(self.progress.steps):
            self.judge()

    def score(self) -> Score:
        """Measure the probes with the weights as they are now, and note it. The first score is what later ones are
        held against, where nothing else is known."""
        with self._scoring:
            score = self.probes.score(self._model, self.progress.steps)
        series = {f"probes.{name}": loss for name, loss in score.losses.items()}
        series |= {f"right.{name}": share for name, share in score.right.items()}
        self._ledger.guards.note(score.step, series)
        if self.probes.good is None and all(map(math.isfinite, score.losses.values())):
            self.probes.passed(self._control.generation, score)
            if self._control.generation == 0 and self.progress.steps == 0:
                self.ensure_alive()
                self._ledger.set_meta(_META, json.dumps(self.probes.about(score)))
        log.info(
            "probes.scored",
            step=score.step,
            losses={name: round(loss, 4) for name, loss in score.losses.items()},
            right={name: round(share, 3) for name, share in score.right.items()},
            good=self.probes.good.generation if self.probes.good else None,
        )
        return score

    def judge(self) -> Score | None:
        """Score the probes; if they have fallen, stop training and leave word in `tripped`. None: there are none."""
        if not self.probes.enabled:
            return None
        score = self.score()
        found, good = self.compare(score), self.probes.good
        if found and self.tripped is None:
            self._pause()
            self.tripped = Trip("probes", score.step, found)
            metrics.trips.labels(guard="probes").inc()
            log.error(
                "guard.tripped",
                guard="probes",
                step=score.step,
                probes=found,
                good=good.generation if good else None,
            )
        return score

    def compare(self, score: Score, good: Good | None = None) -> dict[str, Any]:
        """What has fallen: set -> its loss in the good generation, its loss now, and the margin.

        Raises:
            ArenaError: the weights were gone while they were scored: nothing is to follow from it.
        """
        margin = self.probes.config.margin
        fallen = self.probes.fallen(score, good)
        if fallen:
            self.ensure_alive()
        return {
            name: {
                "was": round(was, 4),
                "is": round(now, 4) if math.isfinite(now) else None,
                "margin": margin,
            }
            for name, (was, now) in fallen.items()
        }
