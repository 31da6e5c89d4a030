"""What rounding adds in the protected directions is taken back, a few layers after each step.

No update has a part in these directions B (k, n) of a layer's input (protection.py). But every write of a bf16 weight
is rounded at random, which is right on average and adds noise in all directions alike, more with every step, until
general text suffers from it more than from what is learned. dW = W - W0, against the model as it came, should have no
part in B: (dW B^T) B is subtracted. What that write's own rounding adds is a fraction of a bf16 gap, however many steps
came before it.

W0 is read from the model's own files, some rows at a time, and not kept. Each layer has its turn once in so many steps.
Files that are not the model as it came, or no longer, end this: updates would be taken for drift, and undone.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hogwild import log as logs
from hogwild import skeleton
from hogwild.errors import CheckpointError
from hogwild.layout import weight_files
from hogwild.streams import settle
from hogwild.tensor_file import Entry, read_header
from hogwild.weights import Weights, digest
from hogwild_kernels import counter, rounding

log = logs.get(__name__)

_BLOCK_BYTES = 16 << 20  # of one fp32 piece of a weight
_TAKEN_BACK = 0x44524946  # apart from the updates' own rounding


class Drift:
    """Takes back what has gathered in the protected directions. For any number of threads, each with its own steps.

    Args:
        weights: the live ones.
        model: a skeleton of them: where each parameter lies, and what the checkpoint calls it.
        folder: the model as it came.
        every: steps in which each layer has its turn once; 0: never.
        seed: of the rounding.
        stochastic: round at random, as updates do.
        moved: called after each write.
        between: called after each layer; the place to yield to the server.
    """

    def __init__(
        self,
        weights: Weights,
        model: PreTrainedModel,
        folder: Path,
        every: int,
        *,
        seed: int = 0,
        stochastic: bool = True,
        moved: Callable[[], None] = lambda: None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._weights, self._model, self._every = weights, model, every
        self._moved, self._between = moved, between
        self._seed, self._stochastic = seed, stochastic
        self._folder, base = folder, _Base(folder)
        places, stored = skeleton.bound(model), skeleton.stored(model)
        self._base, self._transposed = base, skeleton.transposed(model)
        # What lies otherwise in the file (stacked) is left to drift.
        self._places = {
            name: (region, stored[name])
            for name, region in places.items()
            if name in stored and base.shape(stored[name]) == self._as_stored(name, region.shape)
        }
        self._directions: Mapping[str, Tensor] = {}
        self._names: list[str] = []

    def protect(self, directions: Mapping[str, Tensor], base: str) -> None:
        """Begin. Reads all of the model's files once.

        Args:
            directions: name of a linear layer -> (k, n) orthonormal rows, of what is to stay as it came. Of the input
                embedding -> (k,) tokens: nothing is written to their rows, so nothing is rounded there.
            base: digest of the model as it came, see `weights.digest`.
        """
        if not self._every:
            return
        try:
            found = digest(self._folder)
        except CheckpointError as error:
            self._end(str(error))
            return
        if found != base:
            self._end(f"{self._folder} has digest {found}, the model as it came has {base}")
            return
        names = {
            id(weight): name for name, weight in self._model.named_parameters()
        }  # a tied head: the embedding's
        self._directions = {
            names[id(self._model.get_submodule(layer).weight)]: basis
            for layer, basis in directions.items()
            if basis.ndim == 2
        }
        self._names = sorted(self._directions.keys() & self._places.keys())

    def after(self, step: int) -> None:
        """Training step `step` is done: it is some layers' turn."""
        if not self._every:
            return
        for name in self._names[step % self._every :: self._every]:
            try:
                self._take_back(name, step)
            except CheckpointError as error:
                self._end(str(error))
                return
            region, _ = self._places[name]
            settle(self._weights.at(region).device)  # on a GPU: what is said to have moved, has
            self._moved()
            self._between()

    def _as_stored(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if name in self._transposed else shape

    def _end(self, reason: str) -> None:
        self._names = []
        log.warning("protection.adrift", error=reason)

    @torch.no_grad()
    def _take_back(self, name: str, step: int) -> None:
        region, stored = self._places[name]
        weight, basis = self._weights.at(region), self._directions[name].float()
        rows, columns = weight.shape
        a, b = counter.subkey(counter.name_key(self._seed, name), _TAKEN_BACK, step)
        block = max(_BLOCK_BYTES // (4 * columns), 1)
        turned = name in self._transposed  # its rows are the file's columns, so all of it is read
        whole = self._base.rows(stored, 0, columns).t() if turned else None
        for top in range(0, rows, block):
            part = weight[top : top + block]
            count = len(part)
            rows_of_base = self._base.rows(stored, top, count) if whole is None else whole[top : top + count]
            base = rows_of_base.to(weight.device, weight.dtype)
            moved = part.float() - base.float()
            drift = (moved @ basis.t()) @ basis
            bits = None
            if self._stochastic:
                bits = counter.rounding_bits(len(part), columns, a, b, top, weight.device)
            # Read again at the last moment: what another thread has written meanwhile stays, but for a race.
            part.copy_(rounding.round_to(part.float() - drift, weight.dtype, bits))


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model as it came lies."""

    file: Path
    entry: Entry
    stamp: tuple[int, ...]  # of the file, when it was first looked at


class _Base:
    """The model as it came, read in pieces. Raises where it has changed since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}
        for file in weight_files(folder) if folder.is_dir() else []:
            path = folder / file
            stamp = _stamp(path.stat())
            self._places.update(
                {entry.name: _Place(path, entry, stamp) for entry in read_header(path).entries}
            )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor `name`; None if there is none."""
        place = self._places.get(name)
        return None if place is None else place.entry.shape

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """(count, n) of the matrix `name`.

        Raises:
            CheckpointError: the file has gone, or is another one now.
        """
        place = self._places[name]
        row = place.entry.nbytes // place.entry.shape[0]
        try:
            with place.file.open("rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != place.stamp:
                    raise CheckpointError(f"{place.file} has changed since training began")
                data = bytearray(os.pread(file.fileno(), count * row, place.entry.offset + first * row))
        except OSError as error:
            raise CheckpointError(f"{place.file} cannot be read: {error}") from error
        if len(data) != count * row:
            raise CheckpointError(f"{place.file} ends in the middle of {name}")
        return torch.frombuffer(data, dtype=place.entry.torch_dtype).view(count, place.entry.shape[1])


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    # The time of change cannot be set back, as that of writing can (`cp -p`, `touch -r`).
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
