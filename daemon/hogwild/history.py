"""Every generation, restorable exactly: compressed differences between saves, with full bases now and then.

`history_nodes` says what lies where and what leads where, `delta` how a tensor is stored, `history_read` how one comes
back. An entry is written to a folder that no name leads to, fsynced and renamed, after its checkpoint is durable: a
crash costs at most the entry, which is written at the next chance from the checkpoint folders.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hogwild import clock, fresh_folder
from hogwild import generation as generations
from hogwild import log as logs
from hogwild.checkpoint import Checkpoints, folder_bytes, now, remove, side_files
from hogwild.errors import CheckpointError
from hogwild.files import fsync, hash_file, new_file
from hogwild.generation import OPTIMIZER, STATE
from hogwild.history_nodes import (
    BLOBS,
    ENTRY,
    INDEX,
    Broken,
    Entry,
    Links,
    Node,
    entry_json,
    load,
    seal,
)
from hogwild.history_read import BrokenLinkError, Reader
from hogwild.history_write import Writer, fill
from hogwild.layout import weight_files
from hogwild.settings import Config, HistoryConfig
from hogwild.tensor_file import read_header, write_tensors

log = logs.get(__name__)

_UNFINISHED = ".unfinished-"
T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """A generation that is in history now; bytes on disk, and of the checkpoint folder that it stands for."""

    generation: int
    nbytes: int
    full_bytes: int
    base: bool
    seconds: float


class History:
    """The generations of one state folder.

    Args:
        root: its folder.
        checkpoints: the complete folders, which history reads and can make anew.
        config: what is kept. `keep = 0`: nothing is recorded.
    """

    def __init__(
        self, root: Path, checkpoints: Checkpoints, config: HistoryConfig, *, readonly: bool = False
    ) -> None:
        """Make the folder if needed, and clear away what an interrupted write left; with `readonly`, do neither.

        Raises:
            CheckpointError: the folder cannot be made or written.
        """
        self.root, self.checkpoints, self.config = root, checkpoints, config
        self.broken: Broken = {}
        self.interrupt = threading.Event()
        if readonly:
            return
        try:
            (root / BLOBS).mkdir(parents=True, exist_ok=True)
            for folder in (root, root / BLOBS):
                for leftover in folder.glob(f"{_UNFINISHED}*"):
                    remove(leftover)
        except OSError as error:
            raise CheckpointError(f"cannot keep history in {root}: {error}") from error

    @classmethod
    def reading(cls, config: Config) -> "History":
        """To look at while a daemon may be at work: changes nothing."""
        root = config.state_dir
        checkpoints = Checkpoints(root / "checkpoints", config.checkpoint.keep, readonly=True)
        return cls(root / "history", checkpoints, config.history, readonly=True)

    def nodes(self) -> dict[int, Node]:
        """Every generation that is known, oldest first."""
        return load(self.root, self.checkpoints.folders(), self.broken)[0]

    # --- writing ---------------------------------------------------------------------------------------------------

    def record(self) -> list[Recorded]:
        """Take up every complete checkpoint folder that is newer than what is in history, oldest first.

        Raises:
            CheckpointError: one could not be; what is in history stays as it is.
        """
        if not self.config.keep:
            return []
        newest = self._newest()
        folders = self.checkpoints.folders().items()
        return [self._record(number, folder) for number, folder in folders if number > newest]

    def _newest(self) -> int:
        """The newest generation that was recorded: what is older and not here has been forgotten."""
        return max(generations.numbered(self.root), default=0)

    def _record(self, number: int, folder: Path) -> Recorded:
        began = time.perf_counter()
        state = generations.read_state(folder)
        parent = state["parent"]
        if parent == 0 and "base_path" in state:
            self.know_base(Path(state["base_path"]), state.get("base_digest"))
        every = self.config.base_every
        wants_base = bool(every) and number % every == 0
        try:
            reader = self.reader(parent)
        except CheckpointError as error:  # the parent is lost: this one stands on its own
            log.error("history.damaged", part="parent", generation=parent, error=str(error))
            entry = self._put(number, folder, state, None, True)
        else:
            with reader:
                try:
                    entry = self._put(number, folder, state, reader, wants_base)
                except BrokenLinkError as error:
                    self.note(error.part, error)
                    entry = self._put(number, folder, state, None, True)
        return Recorded(
            number,
            folder_bytes(self.root / generations.name(number)),
            folder_bytes(folder),
            entry.base,
            time.perf_counter() - began,
        )

    def know_base(self, model: Path, digest: str | None) -> None:
        """Note the model as it came as generation 0, once: its files' hashes and headers, none of its weights.

        Raises:
            CheckpointError: it cannot be read, or history cannot be written.
        """
        if (self.root / generations.name(0)).is_dir():
            return
        try:
            sums = {path.name: hash_file(path) for path in side_files(model)}
            sums.update({file: hash_file(model / file) for file in weight_files(model)})
            empty = self.root / f"{_UNFINISHED}empty"
            remove(empty)
            sums[str(OPTIMIZER)] = write_tensors(empty, {})
            header = read_header(empty).raw
            remove(empty)
        except OSError as error:
            raise CheckpointError(f"the model in {model} cannot be read: {error}") from error
        state = {
            "generation": 0, "parent": None, "saved_at": now(), "step": 0, "epoch": 0, "ledger_position": 0,
            "base_path": str(model), "base_digest": digest, "trained": {}, "checksums": sums,
        }  # fmt: skip
        self._put(0, model, state, None, False, {str(OPTIMIZER): header})

    def _put(
        self,
        number: int,
        folder: Path,
        state: Mapping[str, Any],
        parent: Reader | None,
        wants_base: bool,
        headers: Mapping[str, bytes] = {},
    ) -> Entry:
        """Write the entry of a generation from its complete folder, durably."""
        unfinished = self.root / f"{_UNFINISHED}{generations.name(number)}"
        base = wants_base or (parent is None and number > 0)
        text = generations.encode_state(state)
        try:
            remove(unfinished)
            unfinished.mkdir(parents=True)
            new_file(unfinished / "state.json", lambda sink: sink.write(text))
            writer = Writer(folder, state, parent, base, self.interrupt, zero=number == 0, headers=headers)
            entry, index = writer.write(unfinished, self.root / BLOBS)
            new_file(unfinished / INDEX, lambda sink: sink.write(seal(index)))
            new_file(unfinished / ENTRY, lambda sink: sink.write(entry_json(entry)))
            fsync(self.root / BLOBS)
            fsync(unfinished)
            unfinished.rename(self.root / generations.name(number))
            fsync(self.root)
        except OSError as error:
            remove(unfinished, ignore_errors=True)
            raise CheckpointError(
                f"{generations.name(number)} could not be recorded in {self.root}: {error}"
            ) from error
        except CheckpointError:
            remove(unfinished, ignore_errors=True)
            raise
        return entry

    # --- reading ---------------------------------------------------------------------------------------------------

    def reader(self, number: int) -> Reader:
        """Any generation, to read tensor by tensor, along a way that is not known to be broken.

        Raises:
            CheckpointError: there is none; says what is broken, and which older generation is whole.
        """
        while True:
            nodes, problems = load(self.root, self.checkpoints.folders(), self.broken)
            path = Links(nodes).path(number)
            if path is None:
                raise CheckpointError(self._lost(number, nodes, problems))
            try:
                return Reader(nodes, path)
            except BrokenLinkError as error:
                self.note(error.part, error)

    def use(self, number: int, what: Callable[[Reader], T]) -> T:
        """Call `what` with a reader; once more, with another way, where something turns out to be damaged.

        Raises:
            CheckpointError: as `reader`.
        """
        while True:
            try:
                with self.reader(number) as reader:
                    return what(reader)
            except BrokenLinkError as error:
                self.note(error.part, error)

    def restore(self, number: int) -> Path:
        """The complete, verified checkpoint folder of a generation; made anew from history where it is needed.

        Raises:
            CheckpointError: it cannot be restored; says what is broken, and which older generation is whole.
        """
        self.broken.clear()  # somebody may have mended it
        folder = self.checkpoints.folders().get(number)
        if folder is not None:
            try:
                generations.verify(folder)
                return folder
            except CheckpointError as error:
                self.note(("folder", number), error)
        made = self.use(
            number, lambda reader: self.checkpoints.put(number, lambda to: fill(to, reader, self.root))
        )
        self.broken.pop(("folder", number), None)
        return made

    def export(self, number: int, target: Path) -> None:
        """Write a generation as a plain model folder, bit-identical to what was saved, into `target`: whole or not.

        Raises:
            CheckpointError: it cannot be restored, or written.
            UsageError: `target` is not empty.
        """

        def write(reader: Reader, folder: Path) -> None:
            for path in folder.iterdir():
                remove(path)
            (folder / "hogwild").mkdir()
            state = fill(folder, reader, self.root)
            text = generations.encode_state(state)
            new_file(folder / STATE, lambda sink: sink.write(text))
            fsync(folder / "hogwild")

        self.broken.clear()
        try:
            with fresh_folder.filling(target) as folder:
                self.use(number, lambda reader: write(reader, folder))
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error

    def known(self, number: int) -> bool:
        """Has there been such a generation, as far as can be told: whole, damaged, or between those that are there?"""
        nodes, problems = load(self.root, self.checkpoints.folders(), self.broken)
        seen = {*nodes, *problems, *(number for _, number in self.broken)}
        return number in seen

    def last_good(self, number: int) -> int | None:
        """The newest ancestor of a generation (or itself) that can be restored, as far as is known; None: none."""
        nodes = self.nodes()
        good = Links(nodes).restorable()
        at: int | None = number
        while at is not None and at not in good:
            older = (known for known in nodes if known < at)
            at = nodes[at].parent if at in nodes else max(older, default=None)
        return at

    def note(self, part: tuple[str, int], error: Exception) -> None:
        """Something is damaged: say so, and use it no more."""
        self.broken[part] = str(error)
        log.error("history.damaged", part=part[0], generation=part[1], error=str(error))

    def unknown(self, number: int, nodes: Iterable[int]) -> str:
        """What to tell somebody who names a generation that is not among `nodes`."""
        known = ", ".join(map(str, nodes)) or "none"
        soon = " (the model as it came is recorded some seconds after the first checkpoint)" * (number == 0)
        return f"there is no generation {number} in {self.root}; there are: {known}{soon}"

    def _lost(self, number: int, nodes: Mapping[int, Node], problems: Mapping[int, str]) -> str:
        if number not in {*nodes, *problems, *(which for _, which in self.broken)}:
            return self.unknown(number, nodes)
        reasons = [*problems.values(), *self.broken.values()]
        good = self.last_good(number)
        advice = "no older one can" if good is None else f"the last good one before it is generation {good}"
        if good == 0:
            advice += (
                ", the model as it came. Bring the files back, or give up what was learned since: "
                "`hogwild rollback 0 --retrain` trains all of it again"
            )
        return "\n  - ".join([f"generation {number} cannot be restored; {advice}", *reasons])

    # --- retention -------------------------------------------------------------------------------------------------

    def prune(self) -> list[int]:
        """Forget the oldest generations beyond `keep`, `max_age_s` and `max_gib`; returns their numbers.

        One whose difference others still need stays until they go.
        """
        nodes = self.nodes()
        current = self.checkpoints.current_generation()
        entries = [number for number, node in nodes.items() if node.entry and number > 0]
        limit = int(self.config.max_gib * 2**30)
        sizes = {number: nodes[number].nbytes for number in entries}
        total, gone = sum(sizes.values()), []
        for place, number in enumerate(entries):
            age = clock.now() - _seconds(nodes[number].state["saved_at"])
            excess = len(entries) - place > self.config.keep
            old = bool(self.config.max_age_s) and age > self.config.max_age_s
            if not (excess or old or (limit and total > limit)) or number == current:
                continue
            rest = {key: node for key, node in nodes.items() if key != number}
            newer = {key for key in Links(nodes).restorable() if key > number}
            if not newer <= Links(rest).restorable():
                continue
            self._forget(number)
            nodes, total = rest, total - sizes[number]
            gone.append(number)
        if gone:
            self._sweep_blobs(nodes)
        return gone

    def may_go(self, number: int, _folder: Path) -> bool:
        """Does history hold all that it holds also without this complete checkpoint folder?"""
        if not self.config.keep:
            return True
        if number > self._newest():
            return False  # not recorded yet
        nodes = self.nodes()
        node = nodes.get(number)
        if node is None:
            return True  # damaged
        before = Links(nodes).restorable()
        node.folder = None
        forgotten = set() if node.entry is not None else {number}
        return before - forgotten <= Links(nodes).restorable()

    def _forget(self, number: int) -> None:
        entry = self.root / generations.name(number)
        away = self.root / f"{_UNFINISHED}old-{entry.name}"
        try:
            remove(away)
            entry.rename(away)
            fsync(self.root)
            remove(away)
        except OSError as error:
            log.warning("history.unpruned", generation=number, error=str(error))

    def _sweep_blobs(self, nodes: Mapping[int, Node]) -> None:
        used = {blob for node in nodes.values() if node.entry for blob in node.entry.blobs.values()}
        for path in (self.root / BLOBS).iterdir():
            if path.name not in used:
                path.unlink(missing_ok=True)


def _seconds(saved_at: str) -> float:
    return datetime.strptime(saved_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
