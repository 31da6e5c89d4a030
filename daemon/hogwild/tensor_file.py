"""Safetensors files, written as a stream and read in pieces.

The safetensors library writes a file from memory that it has copied whole, with no fsync. Here a tensor passes through
one small buffer, what is hashed is exactly what is written (the weights move meanwhile), and the interpreter lock is
free during every copy, hash and write, so that trainer threads go on.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hogwild.errors import CheckpointError, in_short
from hogwild.files import PIECE, Sink, new_file

_DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
    torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `nbytes` bytes from `offset` (of the file), in row-major order."""

    name: str
    dtype: str  # as safetensors spells it: "BF16", "F32", ...
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The beginning of a safetensors file, byte for byte, and what it says."""

    raw: bytes
    entries: tuple[Entry, ...]  # in the order of their bytes


def parse_header(raw: bytes, path: Path) -> Header:
    """Raises CheckpointError when `raw` is not the beginning of a safetensors file without gaps."""
    try:
        length = int.from_bytes(raw[:8], "little")
        if len(raw) != 8 + length:
            raise ValueError("the header is cut off")
        entries = []
        for name, item in json.loads(raw[8:]).items():
            if name != "__metadata__":
                first, last = item["data_offsets"]
                shape = tuple(int(size) for size in item["shape"])
                if last - first != math.prod(shape) * TORCH_DTYPES[item["dtype"]].itemsize:
                    raise ValueError(f"{name} has {last - first} bytes")
                entries.append(Entry(name, item["dtype"], shape, 8 + length + first, last - first))
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        end = 8 + length
        for entry in entries:
            if entry.offset != end:
                raise ValueError(f"{entry.name} does not begin where the one before it ends")
            end += entry.nbytes
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {in_short(error)}") from error
    return Header(raw, tuple(entries))


def read_header(path: Path) -> Header:
    """Raises CheckpointError when the file cannot be read or is not a whole safetensors file."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
            size, length = path.stat().st_size, int.from_bytes(begin, "little")
            raw = begin + file.read(min(length, size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    header = parse_header(raw, path)
    end = header.entries[-1].offset + header.entries[-1].nbytes if header.entries else len(raw)
    if end != size:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes and describes {end}")
    return header


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write live tensors as a new safetensors file, fsynced; returns its sha256.

    Every element is copied once, as one aligned load: it is a value that the element had while the file was written.
    """
    names = sorted(
        tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)
    )  # keeps everything aligned
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        table[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes],
        }  # fmt: skip
        end += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def fill(sink: Sink) -> None:
        sink.write(len(text).to_bytes(8, "little") + text)
        buffer = torch.empty(PIECE, dtype=torch.uint8)
        for name in names:
            for piece in _pieces(tensors[name].detach(), buffer):
                sink.write(piece)

    return new_file(path, fill)


def _pieces(tensor: torch.Tensor, buffer: torch.Tensor) -> Iterator[memoryview]:
    """Its bytes, some at a time in `buffer`. Of a tensor that lies in memory otherwise no whole copy is made: on a GPU
    there may be no room for one."""
    if tensor.is_contiguous():
        parts = torch.split(tensor.reshape(-1), buffer.nbytes // tensor.itemsize)
    elif tensor.nbytes <= buffer.nbytes:
        parts = (tensor,)
    else:
        rows = buffer.nbytes // tensor[0].nbytes
        for part in torch.split(tensor, rows) if rows else tensor.unbind():
            yield from _pieces(part, buffer)
        return
    for part in parts:
        copy = buffer[: part.nbytes].view(_BITS[part.itemsize])
        copy.view(part.shape).copy_(part.view(copy.dtype))
        if part.nbytes:
            yield copy.numpy().data.cast("B")
