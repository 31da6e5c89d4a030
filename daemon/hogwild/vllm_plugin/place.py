"""Puts vLLM's parameters into the arena, before anything is loaded into them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from hogwild.arena.memory import Held
from hogwild.errors import VerificationError
from hogwild.layout import Region

_ALIGNMENT = 256  # of every storage, as torch's own allocators align
_PAGE = 4096

Size = Callable[[torch.UntypedStorage], int]
"""The bytes that a storage has, or had before its memory was given back (vacant.py)."""


def _own_size(storage: torch.UntypedStorage) -> int:
    return storage.nbytes()


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


def device(model: torch.nn.Module) -> torch.device:
    """Where the parameters are that belong into the arena.

    Raises:
        VerificationError: in several places.
    """
    found: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta":
            found.setdefault(parameter.device, name)
    if len(found) > 1:
        raise VerificationError(
            "the weights of this server are on several devices, and can be trained on one only",
            [f"{name}, for one, is on {device}" for device, name in found.items()],
        )
    return next(iter(found), torch.device("cpu"))


def plan(model: torch.nn.Module, size: Size = _own_size) -> tuple[dict[str, Region], int]:
    """Give the storage of every floating-point parameter a place in a new arena.

    Buffers and attributes that share a parameter's storage move with it: moving only the parameter would leave them
    looking at memory that is never trained.

    Returns:
        name -> region, for all tensors that move; and the arena's size in bytes.
    """
    start: dict[int, int] = {}  # a storage -> its offset in the arena
    nbytes = 0
    for _, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        if _moves(parameter, size) and _identity(storage) not in start:
            start[_identity(storage)] = nbytes
            nbytes += -(-size(storage) // _ALIGNMENT) * _ALIGNMENT
    regions = {}
    for slot in slots(model):
        begins = start.get(_identity(slot.tensor.untyped_storage()))
        if begins is not None:
            inside = int(slot.tensor.storage_offset()) * slot.tensor.element_size()
            regions[slot.name] = Region.of(slot.tensor, slot.tensor.data_ptr() - begins - inside)
    return regions, -(-max(nbytes, 1) // _PAGE) * _PAGE


def _identity(storage: torch.UntypedStorage) -> int:
    """Its address; of one whose memory was given back, that of the object."""
    return storage.data_ptr() or -storage._cdata


def _moves(parameter: torch.nn.Parameter, size: Size) -> bool:
    """Does this parameter belong into the arena: floating-point numbers that have memory?"""
    return (
        parameter.is_floating_point()
        and parameter.device.type != "meta"
        and size(parameter.untyped_storage()) > 0
    )


def move(
    model: torch.nn.Module, regions: Mapping[str, Region], segment: Held, size: Size = _own_size
) -> None:
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
        if name not in regions and _moves(parameter, size)
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


def live_extents(model: torch.nn.Module, segment: Held) -> list[tuple[int, int]]:
    """The byte ranges of the arena that the model's tensors look at now, sorted."""
    extents = []
    for slot in slots(model):
        start = slot.tensor.data_ptr() - segment.base
        if slot.tensor.numel() and 0 <= start < segment.nbytes and str(slot.tensor.dtype) != "torch.bool":
            last = sum((n - 1) * s for n, s in zip(slot.tensor.shape, slot.tensor.stride(), strict=True))
            extents.append((start, start + (last + 1) * slot.tensor.element_size()))
    return sorted(extents)
