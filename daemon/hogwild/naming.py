"""Which tensors of a checkpoint make up which parameter of a Hugging Face model, and where it lies if they are in an
arena.

Names differ where transformers has renamed modules since the checkpoint was written, and parameters where it stacks
what the checkpoint keeps apart (the experts of a mixture). Transformers knows both for its own loading; here the same
rules run on places in memory instead of on tensors.
"""

# mypy: disable-error-code="misc"
# transformers is untyped.

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from hogwild.layout import Region

T = TypeVar("T")


class UnplacedError(Exception):
    """These tensors do not lie in memory as one strided view."""


@dataclass(frozen=True)
class Recipe:
    """How a parameter is made of checkpoint tensors.

    Attributes:
        parameter: its name in the model; what a conversion gives besides it is another recipe's.
        parts: pattern of the conversion -> names of the checkpoint tensors that match it, in order. "": the one tensor
            that it is.
        converter: of transformers; None: the tensor as it is.
    """

    parameter: str
    parts: Mapping[str, tuple[str, ...]]
    converter: Any = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the checkpoint tensors."""
        return tuple(name for names in self.parts.values() for name in names)

    def make(self, get: Callable[[str], T], model: PreTrainedModel) -> T:
        """The parameter from its tensors, or its place from theirs.

        Raises:
            UnplacedError: places that make up no one strided view.
        """
        if self.converter is None:
            return get(self.names[0])
        given: dict[str, Any] = {
            pattern: [get(name) for name in names] for pattern, names in self.parts.items()
        }
        for operation in self.converter.operations:
            given = operation.convert(
                given, source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns, full_layer_name=self.parameter, model=model,
                config=model.config, missing_keys=None,
            )  # fmt: skip
        for pattern, made in given.items():
            if self.parameter.endswith(pattern.removeprefix("*").lstrip("^").rstrip("$")) or len(given) == 1:
                result: T = made[0] if isinstance(made, list) else made
                return result
        raise UnplacedError(f"a conversion into {', '.join(given)} is not known")


@dataclass(frozen=True)
class Matrix(Recipe):
    """One matrix of a parameter that is a stack of them.

    Attributes:
        number: its place in the stack that the rest is about.
    """

    number: int = 0

    @classmethod
    def of(cls, stack: Recipe, number: int) -> "Matrix":
        return cls(stack.parameter, stack.parts, stack.converter, number)


def buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint of this model holds besides its parameters: numbers that no gradient moves."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, torch.Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in parameters}


def recipes(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Recipe]:
    """parameter or buffer -> how it is made of the checkpoint tensors called `names`. Those that the model has no use
    for are left out, and so are parameters that nothing makes (tied ones)."""
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **buffers(model)}
    parts: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if pattern is None:
            if target in wanted:
                parts[target] = {"": [name]}
            continue
        for full in _targets(target, by_pattern[pattern]):
            if full in wanted:
                parts.setdefault(full, {}).setdefault(pattern, []).append(name)
    return {
        target: Recipe(
            target,
            {pattern: tuple(found) for pattern, found in by.items()},
            None if "" in by else by_pattern[next(iter(by))],
        )
        for target, by in parts.items()
    }


def _targets(target: str, converter: Any) -> list[str]:
    """Every parameter that a conversion makes; the key is renamed to the first of them."""
    first = converter.target_patterns[0]
    return [target.replace(first, other, 1) for other in converter.target_patterns]


class Place:
    """A strided place in an arena that answers to what transformers' conversions do with tensors."""

    def __init__(self, region: Region) -> None:
        self.region = region

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.region.shape)

    @property
    def ndim(self) -> int:
        return len(self.region.shape)

    def size(self, dim: int) -> int:
        return self.region.shape[dim]

    def contiguous(self) -> "Place":
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known: dict[Any, Callable[..., Any]] = {
            torch.stack: _stack,
            torch.cat: _cat,
            torch.transpose: _transpose,
            torch.chunk: _chunk,
        }
        if function not in known:
            raise UnplacedError(f"{getattr(function, '__name__', function)} of places")
        return known[function](*args, **(kwargs or {}))


def _stack(places: list[Place], dim: int = 0) -> Place:
    first = places[0].region
    itemsize = first.torch_dtype.itemsize
    gap = places[1].region.offset - first.offset if len(places) > 1 else 0
    for number, place in enumerate(places):
        here = place.region
        alike = (here.shape, here.stride, here.dtype) == (first.shape, first.stride, first.dtype)
        if not alike or here.offset != first.offset + number * gap:
            raise UnplacedError("they do not lie at equal distances")
    if gap % itemsize or gap < 0:
        raise UnplacedError("they do not lie in order")
    shape, stride = list(first.shape), list(first.stride)
    shape.insert(dim, len(places))
    stride.insert(dim, gap // itemsize)
    return Place(Region(first.offset, tuple(shape), tuple(stride), first.dtype))


def _cat(places: list[Place], dim: int = 0) -> Place:
    first = places[0].region
    length = 0
    for place in places:
        here = place.region
        others = [i for i in range(len(first.shape)) if i != dim]
        alike = here.dtype == first.dtype and here.stride == first.stride
        if not alike or any(here.shape[i] != first.shape[i] for i in others):
            raise UnplacedError("they are not alike")
        if here.offset != first.offset + length * first.stride[dim] * first.torch_dtype.itemsize:
            raise UnplacedError("they do not lie one after the other")
        length += here.shape[dim]
    shape = list(first.shape)
    shape[dim] = length
    return Place(Region(first.offset, tuple(shape), first.stride, first.dtype))


def _transpose(place: Place, dim0: int, dim1: int) -> Place:
    shape, stride = list(place.region.shape), list(place.region.stride)
    shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
    stride[dim0], stride[dim1] = stride[dim1], stride[dim0]
    return Place(Region(place.region.offset, tuple(shape), tuple(stride), place.region.dtype))


def _chunk(place: Place, chunks: int, dim: int = 0) -> tuple[Place, ...]:
    here = place.region
    length = -(-here.shape[dim] // chunks)
    found = []
    for begun in range(0, here.shape[dim], length):
        shape = list(here.shape)
        shape[dim] = min(length, here.shape[dim] - begun)
        offset = here.offset + begun * here.stride[dim] * here.torch_dtype.itemsize
        found.append(Place(Region(offset, tuple(shape), here.stride, here.dtype)))
    return tuple(found)
