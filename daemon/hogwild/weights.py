"""The served weights as tensors, and the proof that they are what they should be.

The memory model, once and for all:

  who writes     the daemon's trainer threads (APOLLO and Adam, in place), and its supervisor when it restores a
                 checkpoint before training starts. The server writes only while it loads an arena that nobody has yet.
  who reads      the server's forward passes, the trainers' forward and backward passes, the checkpoint writer.
  locks          none. A reader sees each element as some value that it held: the old or the new one, never a mixture,
                 because an element is one aligned 2- or 4-byte store. A reader may see one row of a matrix before an
                 update and the next row after it, and one layer before and the next after. Two writers of the same
                 element may lose one of two updates. Training tolerates all of that (docs/why-it-converges.md).
  forbidden      moving, resizing, re-typing or re-binding a served tensor: CUDA graphs and compiled code hold its
                 address. Also writing anything before `verify_bits` has passed on a fresh arena.
"""

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hogwild.arena import devices
from hogwild.arena.client import Arena
from hogwild.arena.control import ControlPage
from hogwild.errors import CheckpointError, VerificationError
from hogwild.layout import Layout, Region, Source, weight_files
from hogwild.tensor_file import TORCH_DTYPES

_BITS = {2: torch.int16, 4: torch.int32}


class Weights:
    """The checkpoint's tensors, each a view of the arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.names = sorted(arena.layout.tensors)

    def view(self, name: str) -> torch.Tensor:
        """The live tensor `name`, in the checkpoint's shape. Every call gives a version counter of its own."""
        return self.at(self.arena.layout.tensors[name])

    def at(self, region: Region) -> torch.Tensor:
        """What lies there, live, as one tensor."""
        return self.arena.weights.tensor(region.offset, region.shape, region.stride, region.torch_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all views together."""
        return sum(self.view(name).nbytes for name in self.names)

    def check(self, folder: Path) -> None:
        """See that the checkpoint in `folder` can be read and has a tensor for each view.

        Raises:
            CheckpointError: naming everything that does not fit.
        """
        shapes = dict(_read_shapes(folder))
        problems = []
        for name, region in self.arena.layout.tensors.items():
            if name not in shapes:
                problems.append(f"{name}: served, not in the checkpoint")
            elif shapes[name] != region.shape:
                problems.append(f"{name}: {shapes[name]} in the checkpoint, {region.shape} served")
        if problems:
            heading = f"the checkpoint {folder} does not fit the served weights ({len(problems)} found):"
            raise CheckpointError("\n  - ".join([heading, *problems]))

    def write(self, folder: Path) -> None:
        """Copy the checkpoint in `folder` into the arena, in place: how trained weights come back after a restart.

        Raises:
            CheckpointError: as `check`; nothing has been written.
        """
        self.check(folder)
        for name, tensor in read_tensors(folder):
            if name in self.arena.layout.tensors:
                self.view(name).copy_(tensor)


def read_tensors(folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint in `folder`, or those that are wanted, one at a time.

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """
    for file in _files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file is not a dict
                if only is None or name in only:
                    yield name, tensors.get_tensor(name)


def _read_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, from the headers; raises as `read_tensors`."""
    for file in _files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tuple(tensors.get_slice(name).get_shape())


def _files(folder: Path) -> list[Path]:
    files = weight_files(folder) if folder.is_dir() else []
    if not files:
        raise CheckpointError(
            f"{folder} holds no safetensors weights: give the folder of a Hugging Face model"
        )
    return [folder / file for file in files]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Restore or download it again.") from error


def verify_bits(weights: Weights, folder: Path) -> None:
    """Compare every view with the checkpoint in `folder`, bit for bit. Only a fresh arena can pass.

    Raises:
        VerificationError: naming every tensor that is missing, of another shape, or of other bits.
    """
    layout = weights.arena.layout
    problems: list[str] = []
    seen = set()
    for name, tensor in read_tensors(folder):
        seen.add(name)
        if name in layout.frozen:
            continue
        if name not in layout.tensors:
            problems.append(f"{name}: in the checkpoint, not among the served weights")
            continue
        region = layout.tensors[name]
        if tuple(tensor.shape) != region.shape:
            problems.append(f"{name}: {tuple(tensor.shape)} in the checkpoint, {region.shape} served")
            continue
        bits = _BITS[region.torch_dtype.itemsize]
        served = weights.view(name).view(bits)
        stored = tensor.to(served.device, region.torch_dtype).view(bits)
        if not torch.equal(served, stored):
            different = int((served != stored).sum())
            problems.append(f"{name}: {different} of {tensor.numel()} elements differ in their bits")
    problems += [
        f"{name}: served, not in the checkpoint" for name in sorted({*layout.tensors, *layout.frozen} - seen)
    ]
    if problems:
        raise VerificationError(
            f"the server's weights, loaded from {layout.source.path}, are not the model in {folder}", problems
        )


def digest(folder: Path) -> str:
    """sha256 over the names and bits of all tensors of the checkpoint in `folder`: which model it is.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    total = hashlib.sha256()
    for name, tensor in read_tensors(folder):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def load_arena(folder: Path, device: torch.device | str = "cpu") -> Arena:
    """Make an arena straight from a checkpoint, without a server: one tensor after the other, nothing fused. What is no
    weight by its type (a mask, places of tokens) has no place in it.

    Raises:
        ArenaError: there is no room for it on `device`.
        CheckpointError: there is no checkpoint, or it is damaged, or of a type that none of ours could hold.
    """
    regions, frozen, unknown, offset = dict[str, Region](), dict[str, str](), list[str](), 0
    for name, tensor in read_tensors(folder):
        region = Region.of(tensor, tensor.data_ptr() - offset)
        if region.trainable:
            regions[name] = replace(region, stride=tensor.contiguous().stride())
            offset = -(-(offset + tensor.nbytes) // 256) * 256
        elif tensor.dtype in TORCH_DTYPES.values():
            frozen[name] = f"of {region.dtype}"
        else:
            unknown.append(f"{name}: {region.dtype}")
    if unknown:
        heading = f"{folder} holds other numbers than bf16, fp16 and fp32 ones ({len(unknown)} found):"
        raise CheckpointError("\n  - ".join([heading, *unknown]))
    nbytes = -(-max(offset, 1) // 4096) * 4096
    held = devices.allocate(nbytes, torch.device(device))
    source = Source.of(folder, weight_files(folder))
    layout = Layout(nbytes, regions, frozen, regions, source, device=held.device_id, parts=held.parts)
    arena = Arena(held, ControlPage.create(layout.fingerprint()), layout)
    Weights(arena).write(folder)
    return arena
