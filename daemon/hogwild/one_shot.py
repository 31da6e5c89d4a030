"""`hogwild train FILE... --model DIR --out DIR`: the daemon's learning without a server.

The same parts do the work: lines, ledger, curriculum, trainers and optimizer over an arena, checkpoints. Only the
arena is made here, from the model's own files, and what comes out is a plain model folder.
"""

import contextlib
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hogwild import __version__, generation, recovery, state_lock
from hogwild.chat_settings import ChatSettings
from hogwild.checkpoint import Checkpoints
from hogwild.curriculum import Curriculum
from hogwild.errors import AlreadyAccepted, ExampleError, HogwildError, LedgerError, UsageError
from hogwild.groups import Group
from hogwild.learner import Learner
from hogwild.ledger import FileRecord, GoodLine, Ledger
from hogwild.lines import DamagedFileError, content_hash, read_lines
from hogwild.settings import Config, ProbesConfig
from hogwild.spool_files import printable
from hogwild.weights import load_arena

_TURN_S = 0.1
_STOP_TIMEOUT_S = 600.0
MEASURED, MEASURED_OF_A_FILE = 256, 32  # examples whose loss is measured before and after


@dataclass
class FileResult:
    """What became of one file. Losses are means in nats a trained token, over `measured` of its examples."""

    file: str
    examples: int
    """Good lines."""
    rejected: int
    """Bad lines."""
    failed: int = 0
    """Good lines that turned out not to be trainable, such as ones that are too long."""
    measured: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    same_as: str | None = None
    """An earlier file with the same content, which is trained once."""


@dataclass
class Result:
    out: str
    files: list[FileResult]
    passes: int
    steps: int
    seconds: float
    interrupted: bool


@dataclass(frozen=True)
class Now:
    """Where the training is, for a progress bar."""

    passes_done: int
    passes_left: int
    loss: float | None
    """Mean of the newest passes, before each update."""


Records = Mapping[Path, tuple[FileRecord, str | None]]
"""Of each file, what the ledger knows of it, and the name of another with the same content."""


@dataclass
class OneShot:
    """One training run.

    Args:
        config: as for the daemon; its state folder is not touched.
        model: folder of the model, which is only read.
        out: folder that is made; must not exist, or be empty. Its parent is there.
        state: keeps the ledger and the optimizer's state, and goes on where an earlier run in it stopped. None: a
            temporary folder beside `out`.
        device: where the weights are held and trained, as torch names it.
    """

    config: Config
    model: Path
    out: Path
    state: Path | None = None
    device: str = "cpu"
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, files: Sequence[Path], on_progress: Callable[[Now], None] = lambda _now: None) -> Result:
        """Train on `files` until every pass is done or `interrupt` was called; write the model.

        Raises:
            ArenaError: there is no room on `device`, or no such device.
            HogwildError: a trainer failed, nothing could be trained, the model is ruined or could not be written.
        """
        began = time.monotonic()
        with self._state_folder() as state:
            # Without probes: nobody is served by this model, and there is no generation to go back to.
            unwatched = ProbesConfig(own=0, every_updates=0)
            config = self.config.model_copy(
                update={"state_dir": state, "model": str(self.model), "probes": unwatched}
            )
            with Ledger(state / "ledger.sqlite") as ledger:
                records = {path: self._accept(path, ledger) for path in files}
                checkpoints = Checkpoints(state / "checkpoints", config.checkpoint.keep)
                # What counts and is in no checkpoint a run that was killed has lost: `recovery.take` queues it again.
                if ledger.is_idle() and not ledger.has_passes_to_save():
                    return self._publish_again(checkpoints, ledger, records, began)
                curriculum = Curriculum(
                    ledger,
                    config.replay,
                    seed=config.training.seed,
                    step_tokens=config.training.step_tokens,
                )
                arena = load_arena(self.model, self.device)
                arena.chat = ChatSettings.of_arguments(config.server.arguments)  # as it is going to be served
                learner = recovery.take(arena, config, ledger, checkpoints, curriculum).learner
                try:
                    if ledger.is_idle():  # an earlier run had saved it, and only the ledger did not know yet
                        learner.stop(_STOP_TIMEOUT_S)
                        return self._publish_again(checkpoints, ledger, records, began)
                    results = self._learn(learner, ledger, records, on_progress)
                except BaseException:
                    learner.stop(0)  # what it prepares, too, for which the process would wait at its end
                    raise
                learner.save(checkpoints, _about(learner, config))
                self._publish(checkpoints)
                passes = ledger.counts().passes
        return Result(
            str(self.out),
            results,
            passes,
            learner.progress.steps,
            round(time.monotonic() - began, 1),
            interrupted=self._stop.is_set(),
        )

    def _learn(
        self, learner: Learner, ledger: Ledger, records: Records, on_progress: Callable[[Now], None]
    ) -> list[FileResult]:
        """Train, and measure before and after.

        Raises:
            HogwildError: a trainer failed, or the model is ruined.
        """
        results = _results(records)
        most = max(min(MEASURED_OF_A_FILE, MEASURED // len(results)), 1)
        samples = [
            [] if result.same_as else self._sample(Path(result.file), result.examples, most, learner)
            for result in results
        ]
        for result, groups in zip(results, samples, strict=True):
            result.measured, result.loss_before = len(groups), _mean_loss(learner, groups)
        learner.write_own_texts(
            learner.config.state_dir / "selfreplay.json", str(ledger.get_meta("base_digest"))
        )
        self._train(learner, ledger, on_progress)
        for result, groups in zip(results, samples, strict=True):
            result.loss_after = _mean_loss(learner, groups)
            if not math.isfinite(result.loss_after or 0.0):
                raise HogwildError(
                    f"{result.file}: its loss is not a number any more: the model is ruined, and nothing was written; "
                    f"train with a smaller optimizer.lr than {self.config.optimizer.lr:g}"
                )
            result.failed = 0 if result.same_as else ledger.file(records[Path(result.file)][0].file_id).failed
        return results

    def _publish_again(
        self, checkpoints: Checkpoints, ledger: Ledger, records: Records, began: float
    ) -> Result:
        """An earlier run in this state folder has trained all of it, and may not have been able to write `out`.

        Raises:
            HogwildError: there is none that has saved anything, and nothing to train; or `out` cannot be written.
        """
        current = checkpoints.current()
        if current is None:
            raise HogwildError("there is nothing to train: no good line that has not been trained before")
        self._publish(checkpoints)
        steps = generation.read_state(current)["step"]
        seconds = round(time.monotonic() - began, 1)
        return Result(
            str(self.out), _results(records), ledger.counts().passes, steps, seconds, interrupted=False
        )

    def interrupt(self) -> None:
        """Finish the passes under way, save and return from `run`."""
        self._stop.set()

    @contextlib.contextmanager
    def _state_folder(self) -> Iterator[Path]:
        if self.state is not None:
            lock = state_lock.take(self.state)
            try:
                yield self.state
            finally:
                os.close(lock)
            return
        # Beside `out`, so that the finished model only has to be renamed.
        with tempfile.TemporaryDirectory(prefix=f".{self.out.name}.", dir=self.out.parent) as folder:
            yield Path(folder)

    def _accept(self, path: Path, ledger: Ledger) -> tuple[FileRecord, str | None]:
        """The file in the ledger, and the name of another with the same content that was there before."""
        name = printable(str(path))
        try:
            digest, length = content_hash(path)
            lines = read_lines(path, self.config.spool.max_line_bytes)
            passes = self.config.training.passes
            record = ledger.accept_file(name, digest, lines, passes=passes, content_bytes=length)
        except AlreadyAccepted as known:  # or an earlier run in this state folder did it, and we go on
            same = known.name == name or Path(known.name).resolve() == path.resolve()
            return ledger.file(known.file_id), None if same else known.name
        except (DamagedFileError, OSError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error
        return record, None

    def _sample(self, path: Path, examples: int, most: int, learner: Learner) -> list[Group]:
        """Up to `most` of a file's examples, evenly spread over it, as a trainer takes them."""
        stride, found, number = -(-examples // most) or 1, [], 0
        for line in read_lines(path, self.config.spool.max_line_bytes):
            if isinstance(line, GoodLine):
                if number % stride == 0:
                    with contextlib.suppress(ExampleError):  # which its first pass will say
                        found.append(learner.encoder.group(line.example))
                number += 1
        return found

    def _train(self, learner: Learner, ledger: Ledger, on_progress: Callable[[Now], None]) -> None:
        try:
            learner.start()
            while learner.failure is None and not self._stop.is_set():
                left, loss = ledger.remaining()
                on_progress(Now(ledger.counts().passes, left, loss))
                if not left:
                    break
                self._stop.wait(_TURN_S)
            stopped = learner.stop(_STOP_TIMEOUT_S)
        except KeyboardInterrupt:  # given up, which is not the fault of what is being trained
            learner.guard.tried(learner.curriculum.under_way())
            raise
        left, loss = ledger.remaining()
        on_progress(Now(ledger.counts().passes, left, loss))
        if learner.failure is not None:
            if isinstance(learner.failure, LedgerError):
                raise learner.failure
            raise HogwildError(f"a trainer thread died: {learner.failure!r}") from learner.failure
        if not stopped:
            raise HogwildError(f"a trainer thread did not end within {_STOP_TIMEOUT_S:.0f} s")

    def _publish(self, checkpoints: Checkpoints) -> None:
        """Make `out` of the newest checkpoint: whole or not at all, without what only further training needs."""
        current = checkpoints.current()
        if current is None:
            raise HogwildError(f"no checkpoint was written in {checkpoints.root}")
        unfinished = self.out.with_name(f".{self.out.name}.unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            copy = _link_or_copy if self.state is None else shutil.copy2
            shutil.copytree(current, unfinished, ignore=lambda *_: ["hogwild"], copy_function=copy)
            for path in [*unfinished.rglob("*"), unfinished]:
                _fsync(path)
            if self.out.exists():
                self.out.rmdir()
            unfinished.rename(self.out)
            _fsync(self.out.parent)
        except BaseException as error:  # somebody who does not wait for it, too
            shutil.rmtree(unfinished, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            message = f"--out {self.out} could not be written: {error}"
            if self.state is not None:
                message += f"; what was trained is in {current}, and the same command tries again"
            raise HogwildError(message) from error


def _results(records: Records) -> list[FileResult]:
    return [
        FileResult(str(path), record.examples, record.rejected, same_as=same_as)
        for path, (record, same_as) in records.items()
    ]


def _mean_loss(learner: Learner, groups: Sequence[Group]) -> float | None:
    losses = [learner.loss(group) for group in groups]
    return round(sum(losses) / len(losses), 4) if losses else None


def _about(learner: Learner, config: Config) -> dict[str, Any]:
    return {
        "base_path": str(learner.folder),
        "base_digest": learner.ledger.get_meta("base_digest"),
        "version": __version__,
        "config": config.model_dump(mode="json", exclude={"server"}),  # its arguments may hold a key
    }


def _link_or_copy(source: str, target: str) -> None:
    """A second name is as good as a copy of what is about to be deleted, where the disk allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
