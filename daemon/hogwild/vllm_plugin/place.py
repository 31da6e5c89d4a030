"""Puts vLLM's parameters into the arena, before anything is loaded into them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hogwild.arena.memory import Segment
from hogwild.errors import VerificationError
from hogwild.layout import Region

_ALIGNMENT = 256  # of every storage, as torch's own allocators align
_PAGE = 4096


@dataclass
class Slot:
    """One tensor that some module of the model holds: a parameter, a buffer, or a plain attribute."""

    name: str
    tensor: torch.Tensor


def slots(model: torch.nn.Module) -> Iterator[Slot]:
    """Every tensor that the model's modules hold, by name; aliases come up once for each name."""
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                yield Slot(f"{prefix}.{name}" if prefix else name, value)


def plan(model: torch.nn.Module) -> tuple[dict[str, Region], int]:
    """Give the storage of every floating-point parameter a place in a new arena.

    Buffers and attributes that share a parameter's storage move with it: moving only the parameter would leave them
    looking at memory that is never trained.

    Returns:
        name -> region, for all tensors that move; and the arena's size in bytes.
    """
    start: dict[int, int] = {}  # address of a storage -> its offset in the arena
    nbytes = 0
    for _, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        if _moves(parameter) and storage.data_ptr() not in start:
            start[storage.data_ptr()] = nbytes
            nbytes += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
    regions = {}
    for slot in slots(model):
        address = slot.tensor.untyped_storage().data_ptr()
        if address in start:
            regions[slot.name] = Region.of(slot.tensor, address - start[address])
    return regions, -(-max(nbytes, 1) // _PAGE) * _PAGE


def _moves(parameter: torch.nn.Parameter) -> bool:
    """Does this parameter belong into the arena: floating-point numbers that have memory?"""
    return (
        parameter.is_floating_point()
        and parameter.device.type != "meta"
        and parameter.untyped_storage().nbytes() > 0
    )


def move(model: torch.nn.Module, regions: Mapping[str, Region], segment: Segment) -> None:
    """Point every tensor named in `regions` at its place in the arena. Contents do not move.

    Raises:
        VerificationError: the model holds other tensors than those; nothing has been moved.
    """
    by_name: dict[str, list[torch.Tensor]] = {}
    for slot in slots(model):
        by_name.setdefault(slot.name, []).append(slot.tensor)
    problems = [f"{name} is in the arena and not in the model" for name in regions if name not in by_name]
    problems += [
        f"{name} is in the model and not in the arena"
        for name, parameter in model.named_parameters()
        if name not in regions and _moves(parameter)
    ]
    for name, region in regions.items():
        for tensor in by_name.get(name, []):
            here = Region.of(tensor, tensor.data_ptr() - region.offset)
            if (here.dtype, here.shape) != (region.dtype, region.shape):
                problems.append(
                    f"{name} is {region.dtype} {region.shape} in the arena, {here.dtype} {here.shape} in the model"
                )
            elif here != region:
                problems.append(
                    f"{name} has strides {region.stride} in the arena, {here.stride} in the model"
                )
    if problems:
        raise VerificationError(
            "the daemon's arena does not fit the model that vLLM built (restart the daemon to let go of it)",
            problems,
        )
    for name, region in regions.items():
        for tensor in by_name[name]:
            tensor.data = segment.tensor(region.offset, region.shape, region.stride, region.torch_dtype)


def live_extents(model: torch.nn.Module, segment: Segment) -> list[tuple[int, int]]:
    """The byte ranges of the arena that the model's tensors look at now, sorted."""
    extents = []
    for slot in slots(model):
        start = slot.tensor.data_ptr() - segment.base
        if slot.tensor.numel() and 0 <= start < segment.nbytes and str(slot.tensor.dtype) != "torch.bool":
            last = sum((n - 1) * s for n, s in zip(slot.tensor.shape, slot.tensor.stride(), strict=True))
            extents.append((start, start + (last + 1) * slot.tensor.element_size()))
    return sorted(extents)
