"""When a checkpoint is written: by time, by updates, or because somebody asks; and who is told what became of it.

How one is written is `keeper.py` and `checkpoint.py`. Called by the supervisor's loop, but for `starts_from`.
"""

import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from hogwild import __version__, generation, metrics
from hogwild import log as logs
from hogwild.commands import Command
from hogwild.errors import CheckpointError
from hogwild.keeper import Keeper
from hogwild.learner import Learner, Saved
from hogwild.ledger import Ledger
from hogwild.settings import Config

log = logs.get(__name__)

_VERSIONS = ("torch", "transformers", "safetensors")


class CheckpointSchedule:
    """One for the life of a daemon.

    Attributes:
        save_now: a signal asks for one; nobody waits for an answer.
        saved_step: the step whose weights are on disk, by the live counter.
        unwritten: why the newest checkpoint could not be written; empty: it could, or there was none.
    """

    def __init__(self, config: Config, ledger: Ledger, keeper: Keeper) -> None:
        self._config, self._ledger, self._keeper = config, ledger, keeper
        self.save_now, self.unwritten = False, ""
        self.saved_step, self._tried_step, self._tried_at = 0, 0, time.monotonic()
        self._asked: list[Command] = []  # for a checkpoint that is not begun yet
        self._saving: list[Command] = []  # for the one that is being written

    def configure(self, config: Config) -> None:
        """Take over settings."""
        self._config = config

    def starts_from(self, step: int) -> None:
        """An arena is taken over whose weights were those of the newest checkpoint at that step."""
        self.mark_saved(step)
        self._tried_at = time.monotonic()

    def mark_saved(self, step: int) -> None:
        """What the weights are now is on disk."""
        self.saved_step, self._tried_step, self.unwritten = step, step, ""

    def ask(self, command: Command) -> None:
        """Save as soon as no other save is under way, and answer then."""
        self._asked.append(command)

    def due(self, learner: Learner) -> bool:
        """Is it time for one, or does somebody ask?

        Where it is time and there is nothing to save, the next interval begins: the ledger is not asked in each turn of
        an idle daemon.
        """
        settings, steps = self._config.checkpoint, learner.progress.steps
        if self.save_now or self._asked:
            return True
        by_time = settings.interval_s and time.monotonic() - self._tried_at >= settings.interval_s
        by_updates = settings.interval_updates and steps - self._tried_step >= settings.interval_updates
        if not (by_time or by_updates):
            return False
        if not self.unsaved(learner):
            self._tried_step, self._tried_at = steps, time.monotonic()
            return False
        return True

    def unsaved(self, learner: Learner) -> bool:
        """Is there anything in the weights that no checkpoint is sure to hold?"""
        return learner.progress.steps != self.saved_step or self._ledger.has_passes_to_save()

    def begin(self, learner: Learner) -> None:
        """Begin a checkpoint in the background; `collect` will tell what became of it."""
        urgent, self.save_now = self.save_now or bool(self._asked), False
        self._saving, self._asked = self._asked, []
        current = self._keeper.checkpoints.current()
        if not self.unsaved(learner) and current is not None:
            self._answer(current, learner.progress.steps, unchanged=True)
            log.info("checkpoint.unchanged", path=str(current), step=self.saved_step)
            return
        self._tried_step, self._tried_at = (
            learner.progress.steps,
            time.monotonic(),
        )  # a full disk: when the next is due
        self._keeper.start_saving(learner, self._about(learner), urgent=urgent)

    def collect(self, *, wait: bool = False) -> bool:
        """Has the checkpoint that was begun got onto disk since the last call? Whoever asked for it is told.

        Raises:
            HogwildError: something else than the checkpoint failed, such as the ledger.
        """
        saved = self._keeper.saved(wait=wait)
        return saved is not None and self._after_save(saved)

    def save(self, learner: Learner) -> bool:
        """Write a checkpoint in the calling thread, at once. Whether it is on disk."""
        return self._after_save(self._keeper.save(learner, self._about(learner)))

    def refuse(self, reason: str) -> None:
        """Nothing is saved any more: whoever waits is told why."""
        for command in (*self._asked, *self._saving):
            command.refuse(reason)

    def _after_save(self, saved: Saved | CheckpointError) -> bool:
        metrics.checkpoints.labels(outcome="failed" if isinstance(saved, CheckpointError) else "saved").inc()
        if isinstance(saved, CheckpointError):
            self.unwritten = str(saved)
            log.error("checkpoint.failed", step=self._tried_step, error=self.unwritten)
            for command in self._saving:
                command.refuse(str(saved))
            self._saving = []
            return False
        self.saved_step, self.unwritten = saved.step, ""
        self._answer(saved.path, saved.step, unchanged=False)
        return True

    def _answer(self, path: Path, step: int, unchanged: bool) -> None:
        for command in self._saving:
            command.done(generation=generation.number(path), step=step, path=str(path), unchanged=unchanged)
        self._saving = []

    def _about(self, learner: Learner) -> dict[str, Any]:
        """What state.json says besides."""
        return {
            "base_path": str(learner.folder),
            "base_digest": self._ledger.get_meta("base_digest"),
            "source": asdict(learner.arena.layout.source),
            "config": self._config.model_dump(
                mode="json", exclude={"server"}
            ),  # its arguments may hold a key
            "versions": {"hogwild": __version__, **{name: metadata.version(name) for name in _VERSIONS}},
        }
