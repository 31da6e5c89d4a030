"""Where each tensor of the checkpoint lies in the arena. Made by the server, checked and used by the daemon."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hogwild.errors import CheckpointError, ProtocolError, in_short

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
_DEVICE = re.compile(r"cpu|GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Region:
    """A strided piece of the arena.

    Attributes:
        offset: bytes from the start of the arena.
        shape: as in the checkpoint (for a checkpoint tensor) or in vLLM (for one of its parameters).
        stride: in elements.
        dtype: "bfloat16", "float16" or "float32"; may differ from the checkpoint's where vLLM casts at load.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor, base: int) -> "Region":
        """The region that `tensor` occupies in the segment that starts at address `base`."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tensor.data_ptr() - base, tuple(tensor.shape), tuple(tensor.stride()), dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def trainable(self) -> bool:
        """Is it of a type that updates are made for? No other may lie in an arena."""
        return self.dtype in _DTYPES

    @property
    def end(self) -> int:
        """First byte after the last element."""
        if 0 in self.shape:
            return self.offset
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.offset + (last + 1) * self.torch_dtype.itemsize

    def fits(self, nbytes: int) -> bool:
        """Does it lie inside an arena of that size, with no more elements than there is room for?"""
        numbers = (self.offset, *self.shape, *self.stride)
        return (
            min(numbers) >= 0
            and max(numbers) <= nbytes
            and self.end <= nbytes
            and math.prod(self.shape) * self.torch_dtype.itemsize <= nbytes
        )


@dataclass(frozen=True)
class Source:
    """Which model an arena was asked for.

    Files are known by size, modification time and inode: enough to recognise the same folder again without reading
    any of it. That two folders hold the same model is decided bit by bit, by the daemon.
    """

    path: str
    files: tuple[tuple[str, int, int, int], ...]  # name, bytes, mtime in ns, inode
    config: str  # sha256 of config.json

    @classmethod
    def of(cls, folder: Path, weight_files: Iterable[str]) -> "Source":
        files = []
        for name in sorted(Path(file).name for file in weight_files):
            status = (folder / name).stat()
            files.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
        digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        return cls(str(folder.resolve()), tuple(files), digest)

    def same_files(self, other: "Source") -> bool:
        """Is this the very same set of files (the folder may have been renamed or linked)?"""
        return self.files == other.files and self.config == other.config


@dataclass(frozen=True)
class Layout:
    """What the arena holds.

    Attributes:
        nbytes: size of the weight segment.
        tensors: checkpoint tensor -> where it lies.
        frozen: checkpoint tensor -> why it cannot be trained (vLLM keeps no plain copy of it).
        parameters: vLLM's own parameter (or buffer, or other tensor attribute) -> where it lies. A restarted server
            puts its parameters in the same places.
        source: the model that was asked for, as it came.
        checkpoint: the folder of ours that the arena was filled from instead (that model, trained); "": `source`.
        device: where the arena is, as `Held.device_id`: "cpu", or "GPU-" and the UUID of a GPU.
        parts: bytes of the allocations that make up the arena, one after the other, each with a descriptor of its own.
            Empty: it is one allocation. Offsets are those in the whole.
    """

    nbytes: int
    tensors: Mapping[str, Region]
    frozen: Mapping[str, str]
    parameters: Mapping[str, Region]
    source: Source
    versions: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    device: str = "cpu"
    parts: tuple[int, ...] = ()

    @property
    def allocations(self) -> tuple[int, ...]:
        """Bytes of each, one a descriptor."""
        return self.parts or (self.nbytes,)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> bytes:
        """32 bytes that are equal for equal layouts."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).digest()

    @classmethod
    def from_json(cls, data: Any) -> "Layout":
        """Check and convert what came over the socket.

        Raises:
            ProtocolError: a field is missing or of the wrong type, a region leaves the arena, or its parts do not
                make it up.
        """
        try:
            layout = cls(
                nbytes=_integer(data["nbytes"]),
                tensors={name: _region(item) for name, item in data["tensors"].items()},
                frozen={str(name): str(reason) for name, reason in data["frozen"].items()},
                parameters={name: _region(item) for name, item in data["parameters"].items()},
                source=source_from_json(data["source"]),
                versions={str(key): str(value) for key, value in data["versions"].items()},
                checkpoint=str(data["checkpoint"]),
                device=str(data["device"]),
                parts=tuple(_integer(size) for size in data["parts"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"the peer sent a malformed layout: {error!r}") from error
        if layout.nbytes < 1:
            raise ProtocolError(f"the peer's layout is for an arena of {layout.nbytes} bytes")
        if layout.parts and (min(layout.parts) < 1 or sum(layout.parts) != layout.nbytes):
            raise ProtocolError(
                f"the peer's layout is for an arena of {layout.nbytes} bytes in parts of {layout.parts}, "
                "which do not make it up"
            )
        if not _DEVICE.fullmatch(layout.device):
            raise ProtocolError(f"the peer's layout is for a device that is none: {layout.device!r:.80}")
        for name, region in (*layout.tensors.items(), *layout.parameters.items()):
            if not region.fits(layout.nbytes):
                raise ProtocolError(f"the peer's layout puts {name} outside of the arena: {region}")
            if region.offset % region.torch_dtype.itemsize:
                raise ProtocolError(f"the peer's layout puts {name} at an unaligned offset: {region}")
        return layout


def source_from_json(data: Any) -> Source:
    """Raises KeyError, TypeError or ValueError for anything that is not a source."""
    files = tuple(
        (str(name), _integer(size), _integer(mtime), _integer(inode))
        for name, size, mtime, inode in data["files"]
    )
    return Source(str(data["path"]), files, str(data["config"]))


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that make up the model in `folder`: those of the index if there is one.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index} cannot be read: {in_short(error)}. Restore or download it again."
            ) from error
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _region(item: Any) -> Region:
    region = Region(
        _integer(item["offset"]),
        tuple(_integer(size) for size in item["shape"]),
        tuple(_integer(step) for step in item["stride"]),
        str(item["dtype"]),
    )
    if region.dtype not in _DTYPES or len(region.shape) != len(region.stride):
        raise ValueError(f"not a region: {item}")
    return region


def _integer(value: Any) -> int:
    """A whole number as JSON has it: `int` would also take "7", 7.9 and true, and overflow on Infinity."""
    if type(value) is not int:
        raise TypeError(f"not a whole number: {value!r:.40}")
    return value
