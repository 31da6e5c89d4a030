"""What history holds of each generation, and which generations can be reached from which. Imports no torch.

    <root>/generation-00000012/   state.json  as it was saved
                                  entry.json  what leads where (`Entry`), and which blobs belong to it
                                  index.json  every file and tensor: hashes before and after, where its frames lie
                                  delta.bin   frames against the parent, moments on their own
                                  base.bin    now and then: frames of the weights on their own, a full base
    <root>/blobs/<sha256>         configuration, tokenizer: one copy for all generations

Exclusive or works in both directions. A generation can therefore be restored from any whole copy (a checkpoint folder,
a full base, the model as it came) that is linked with it, older or newer.
"""

import hashlib
import json
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hogwild import generation as generations
from hogwild.errors import CheckpointError, in_short

DELTA, BASE, ENTRY, INDEX, BLOBS = "delta.bin", "base.bin", "entry.json", "index.json", "blobs"
LINKED = ("xor", "same")  # codings that need the parent

Broken = dict[tuple[str, int], str]
"""What has turned out to be damaged: ("folder" | "delta" | "base" | "index" | "model", generation) -> how; "model": the
one that generation 0 is, where it came from."""


@dataclass(frozen=True)
class Entry:
    """What entry.json says.

    Attributes:
        delta: weights are stored against the parent.
        both_ways: and the parent's weights follow from these.
        base: weights are stored on their own, too.
        whole: no weight needs another generation.
        blobs: files without tensors: name -> hash.
    """

    delta: bool
    both_ways: bool
    base: bool
    whole: bool
    blobs: Mapping[str, str]


@dataclass
class Node:
    """One generation.

    Attributes:
        state: its state.json.
        path, entry: its folder in history and what it is good for; None while only a checkpoint folder has it.
        folder: a complete folder of it (for generation 0: perhaps the model itself); None if there is none.
        moments: its own frames are intact, as far as is known.
    """

    number: int
    state: dict[str, Any]
    path: Path | None = None
    entry: Entry | None = None
    folder: Path | None = None
    moments: bool = True

    @property
    def parent(self) -> int | None:
        value: int | None = self.state["parent"]
        return value

    @property
    def model(self) -> Path | None:
        """Of generation 0: where the model came from, if it is there."""
        path = Path(self.state.get("base_path", ""))
        return path if self.number == 0 and path.is_dir() else None

    @cached_property
    def index(self) -> dict[str, Any]:
        """What index.json says; empty without an entry. Raises CheckpointError."""
        return unseal(self.path / INDEX) if self.path is not None else {}

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.index.get("tensors", {})
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in history."""
        return sum(path.stat().st_size for path in self.path.iterdir()) if self.path else 0


def load(
    root: Path,
    folders: Mapping[int, Path],  # complete checkpoint folders
    broken: Collection[tuple[str, int]] = (),
) -> tuple[dict[int, Node], dict[int, str]]:
    """Every generation that is known, without what is broken; and what cannot be read, by generation."""
    nodes: dict[int, Node] = {}
    problems: dict[int, str] = {}
    broken = set(broken)  # another thread may find out about more
    for number, path in generations.numbered(root).items():
        if ("index", number) in broken:
            continue
        try:
            state = generations.parse_state(path / "state.json")
            said = unseal(path / ENTRY)
            entry = Entry(*(said[name] for name in ("delta", "both_ways", "base", "whole", "blobs")))
        except (CheckpointError, KeyError) as error:
            problems[number] = str(error)
            continue
        lost_delta, lost_base = ("delta", number) in broken, ("base", number) in broken
        entry = Entry(
            entry.delta and not lost_delta,
            entry.both_ways and not lost_delta,
            entry.base and not lost_base,
            entry.whole and not lost_delta,
            entry.blobs,
        )
        nodes[number] = Node(number, state, path, entry, moments=not lost_delta)
    zero = nodes.get(0)
    if zero is not None and zero.model is not None and ("model", 0) not in broken:
        zero.folder = zero.model
    for number, folder in folders.items():
        try:
            state = generations.read_state(folder)
        except CheckpointError as error:
            problems.setdefault(number, str(error))
            continue
        node = nodes.setdefault(number, Node(number, state))
        if ("folder", number) not in broken:
            node.folder = folder
    known = {number: node for number, node in nodes.items() if node.folder or node.entry}
    return dict(sorted(known.items())), problems


def seal(content: Mapping[str, Any]) -> bytes:
    """As JSON with a checksum of its own."""
    return json.dumps({**content, "checksum": _checksum(content)}).encode() + b"\n"


def unseal(path: Path) -> dict[str, Any]:
    """Read what `seal` made. Raises CheckpointError when it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content["checksum"] != _checksum(content):
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {in_short(error)}") from error
    return content


def entry_json(entry: Entry) -> bytes:
    """entry.json"""
    return seal(asdict(entry))


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Links:
    """Which generations lead to which."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        self._nodes = nodes
        self._ways: dict[int, list[int]] = {number: [] for number in nodes}  # whose bits help to get its own
        for number, node in nodes.items():
            parent = node.parent
            if parent is not None and parent in nodes and node.entry is not None and node.entry.delta:
                self._ways[number].append(parent)
                if node.entry.both_ways:
                    self._ways[parent].append(number)

    def path(self, target: int) -> list[int] | None:
        """The shortest way from a generation to a whole copy, both included; None: it cannot be restored."""
        node = self._nodes.get(target)
        if node is None or (node.folder is None and (node.entry is None or not node.moments)):
            return None
        came_from: dict[int, int | None] = {target: None}
        queue = deque([target])
        while queue:
            here = queue.popleft()
            if self._whole(here):
                way = [here]
                while (before := came_from[way[-1]]) is not None:
                    way.append(before)
                return way[::-1]
            for there in self._ways[here]:
                if there not in came_from:
                    came_from[there] = here
                    queue.append(there)
        return None

    def restorable(self) -> set[int]:
        """Every generation that has a path."""
        leads_here: dict[int, list[int]] = {number: [] for number in self._nodes}
        for number, ways in self._ways.items():
            for there in ways:
                leads_here[there].append(number)
        found = {number for number in self._nodes if self._whole(number)}
        queue = deque(found)
        while queue:
            for number in leads_here[queue.popleft()]:
                if number not in found:
                    found.add(number)
                    queue.append(number)
        return {
            number
            for number in found
            if self._nodes[number].folder or (self._nodes[number].entry and self._nodes[number].moments)
        }

    def _whole(self, number: int) -> bool:
        """Are the weights of this generation at hand without any other?"""
        node = self._nodes[number]
        return node.folder is not None or (node.entry is not None and (node.entry.base or node.entry.whole))
