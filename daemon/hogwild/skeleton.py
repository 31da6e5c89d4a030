"""A Hugging Face model whose parameters are views of the arena: built on the meta device, it owns no weights."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from hogwild import as_served, experts, naming, rope
from hogwild.errors import VerificationError
from hogwild.layout import Region
from hogwild.weights import Weights, read_tensors
from hogwild_kernels import products


def build(folder: Path, weights: Weights, *, apart: bool = False) -> PreTrainedModel:
    """Build the model of `folder` around the live weights; nothing requires a gradient.

    Parameters whose tensors the server keeps no plain copy of (`layout.frozen`) are read from the checkpoint: they
    never change. So are buffers that a checkpoint holds, if they are not served live. What serves pictures and
    sound is left out. Rotary frequencies are those of the server that brought the weights (`rope.py`).

    Args:
        apart: the experts of a mixture are layers of their own (`experts.py`).

    Raises:
        VerificationError: naming every parameter that has no view, or one of another shape.
    """
    model = empty(folder)
    layout, device = weights.arena.layout, weights.arena.weights.device
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found = naming.recipes(model, [*layout.tensors, *layout.frozen])
    regions, private = place(model, found, layout.tensors)
    copies = _read(folder, {name for recipe in private for name in recipe.names})
    problems, buffers, served = [], naming.buffers(model), _common_type(layout.tensors.values())
    for name, parameter in [*model.named_parameters(), *buffers.items()]:
        if name in regions:
            tensor = weights.at(regions[name])
        elif name in found:
            tensor = found[name].make(copies.__getitem__, model).to(device)
            if isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear | Conv1D):
                tensor = tensor.to(served)  # as the server has it: what it multiplies is of one type
        else:
            if name not in tied and name not in buffers:
                problems.append(f"{name}: needed by {type(model).__name__}, not served")
            continue
        if tensor.shape != parameter.shape:
            problems.append(f"{name}: {tuple(parameter.shape)} in the model, {tuple(tensor.shape)} served")
            continue
        assign(model, name, tensor)
    if problems:
        raise VerificationError(f"the served weights do not make up a {type(model).__name__}", problems)
    model.tie_weights()
    for name in tied & regions.keys():
        # Tied by the configuration, and another tensor in the checkpoint: vLLM serves that one.
        assign(model, name, weights.at(regions[name]))
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise VerificationError(
            f"parts of {type(model).__name__} are tied to nothing that is served",
            [f"{name}: no tensor" for name in left],
        )
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    turned = linearise(model, regions)
    recipes = {name: recipe for name, recipe in found.items() if name not in buffers}
    if apart:
        stacks = take_apart(model, regions, recipes)
        turned |= {
            n for n, stack in stacks.items() if model.get_submodule(stack.rpartition(".")[0]).is_transposed
        }
    model.arena_transposed = turned
    names = {name for name, _ in model.named_parameters()}
    model.arena_regions = {name: region for name, region in regions.items() if name in names}
    model.arena_recipes = recipes
    model.arena_twins = twins(model, found, regions)
    rope.fix(model, weights.arena.max_model_len)
    return model


def bound(model: PreTrainedModel) -> dict[str, Region]:
    """The parameters of a skeleton that lie in the arena: name in the model -> where."""
    regions: dict[str, Region] = model.arena_regions
    return regions


def stored(model: PreTrainedModel) -> dict[str, str]:
    """Parameters of a skeleton that are one tensor of the checkpoint as it is: name in the model -> name there."""
    recipes: dict[str, naming.Recipe] = model.arena_recipes
    return {
        name: recipe.names[0]
        for name, recipe in recipes.items()
        if recipe.converter is None and not isinstance(recipe, naming.Matrix)
    }


def origin(model: PreTrainedModel, name: str) -> str:
    """What transformers calls the parameter of a skeleton: of one expert, the stack."""
    recipes: dict[str, naming.Recipe] = model.arena_recipes
    return recipes[name].parameter if name in recipes else name


def transposed(model: PreTrainedModel) -> frozenset[str]:
    """Parameters of a skeleton that lie the other way round in the checkpoint, which a shape does not tell of a square
    one."""
    found: frozenset[str] = model.arena_transposed
    return found


def stored_twice(model: PreTrainedModel) -> list[str]:
    """Parameters of a skeleton that are tied to another, and that the checkpoint has a tensor of their own for, which
    nobody serves: what is saved of them is the model as it came."""
    found: list[str] = model.arena_twins
    return found


def twins(model: PreTrainedModel, recipes: Iterable[str], regions: Mapping[str, Region]) -> list[str]:
    """`stored_twice`, from the names that the checkpoint has and those that are served."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return sorted((tied & set(recipes)) - regions.keys())


def table_name(model: PreTrainedModel) -> str:
    """Name of the module that is the input embedding."""
    table = model.get_input_embeddings()
    names: Iterator[str] = (name for name, module in model.named_modules() if module is table)
    return next(names)


def weight_name(model: PreTrainedModel, layer: torch.nn.Module) -> str:
    """Name of the weight of a layer: that of a tied head is the embedding's."""
    names: Iterator[str] = (name for name, weight in model.named_parameters() if weight is layer.weight)
    return next(names)


@contextlib.contextmanager
def older(model: PreTrainedModel, folder: Path, names: Iterable[str]) -> Iterator[None]:
    """While this is open, these parameters are as in the checkpoint in `folder`, and not the live ones. Nothing is
    written to the arena."""
    recipes: dict[str, naming.Recipe] = model.arena_recipes
    wanted = [name for name in names if name in recipes]
    tensors = _read(folder, {part for name in wanted for part in recipes[name].names})
    before = {name: model.get_parameter(name) for name in wanted}
    alike: dict[int, list[str]] = {}  # a tied head goes with the embedding
    for name, parameter in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(parameter), []).append(name)
    made: dict[str, torch.Tensor] = {}  # stacks, once
    try:
        for name, live in before.items():
            recipe = recipes[name]
            if recipe.parameter not in made:
                made[recipe.parameter] = recipe.make(tensors.__getitem__, model)
            tensor = made[recipe.parameter]
            if isinstance(recipe, naming.Matrix):
                tensor = tensor[recipe.number]
            tensor = (tensor.t() if name in transposed(model) else tensor).to(live.device, live.dtype)
            for same in alike[id(live)]:
                assign(model, same, tensor)
        yield
    finally:
        for live in before.values():
            for same in alike[id(live)]:
                assign(model, same, live.data)


def empty(folder: Path) -> PreTrainedModel:
    """The model of `folder` on the meta device: its language model and head alone."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = as_served.settings(config)
    kind = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:
        kind = AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = kind.from_config(config, dtype=config.dtype, **settings)
    with contextlib.suppress(OSError):  # many have none; the configuration says it then
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    as_served.adjust(model)
    decoder = model.get_decoder()
    kept = {id(module) for module in decoder.modules()}
    if (base := model.base_model) is not decoder:
        for name, child in list(base.named_children()):
            if not kept & {id(module) for module in child.modules()}:
                setattr(base, name, torch.nn.Module())  # a tower: never called for text
    return model.eval()


def place(
    model: PreTrainedModel, recipes: dict[str, naming.Recipe], tensors: Any
) -> tuple[dict[str, Region], list[naming.Recipe]]:
    """(parameter -> its place in the arena, recipes of those that have none)."""
    regions, private = {}, []
    for name, recipe in recipes.items():
        if all(part in tensors for part in recipe.names):
            try:
                regions[name] = recipe.make(lambda part: naming.Place(tensors[part]), model).region
                continue
            except naming.UnplacedError:
                pass  # live, and not as one view: the trainer cannot look at it
        private.append(recipe)
    return regions, private


class _Product(torch.autograd.Function):
    """y = x W^T + b with W and b constant. W is not saved: another thread may have moved it by the backward pass,
    which then takes it as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return products.input_gradient(d, ctx.weight), None, None


class FrozenLinear(torch.nn.Linear):
    """A linear layer that passes gradients on and has none, multiplied as `hogwild_kernels.products` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., n) -> (..., m)"""
        result: torch.Tensor = _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result


class Uncalled(torch.nn.Linear):
    """A linear layer whose weight the model's own code multiplies by: nothing that it does when called counts."""


def is_linear(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Does it compute y = x W^T + b, and nothing else? Judged by what it computes on a tiny weight, for a subclass of a
    linear layer may be just that in its own words, or a router that returns which experts it has chosen."""
    if not isinstance(module, torch.nn.Linear) or isinstance(module, Uncalled):
        return False
    if type(module) in (torch.nn.Linear, FrozenLinear):
        return True
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (5, 3), "bias": (5,)}
    names = [name for name, _ in module.named_parameters()]
    if not shapes.keys() >= set(names):
        return False
    tried = {name: torch.randn(shapes[name], generator=generator) for name in names}
    x = torch.randn(2, 4, 3, generator=generator)
    try:
        with torch.no_grad():
            out = torch.func.functional_call(module, tried, (x,))
    except Exception:  # other shapes, other arguments, kernels for a GPU alone: it is something else
        return False
    wanted = torch.nn.functional.linear(x, tried["weight"], tried.get("bias"))
    same = isinstance(out, torch.Tensor) and out.shape == wanted.shape and out.dtype == wanted.dtype
    return same and torch.allclose(out, wanted, atol=1e-5)


def linearise(model: PreTrainedModel, regions: dict[str, Region]) -> frozenset[str]:
    """Make every linear layer one that has no gradient of its own, and of those that lie transposed linear layers.

    Returns:
        Names of the weights of those.
    """
    turned = set()
    for name, module in list(model.named_modules()):
        if is_linear(module):
            module.__class__ = FrozenLinear
        elif type(module) is Conv1D:
            _set(model, name, _linear(module))
            turned.add(f"{name}.weight")
            if (weight := f"{name}.weight") in regions:
                regions[weight] = replace(
                    regions[weight], shape=regions[weight].shape[::-1], stride=regions[weight].stride[::-1]
                )
    return frozenset(turned)


def take_apart(
    model: PreTrainedModel, regions: dict[str, Region], recipes: dict[str, naming.Recipe]
) -> dict[str, str]:
    """Make experts layers of their own, also in `regions` and `recipes`: parameters that are new -> their stacks."""
    found = experts.unstack(model, regions, _layer_of)
    for name, stack in found.items():
        recipes[name] = naming.Matrix.of(recipes[stack], int(name.split(".")[-2]))
    for stack in set(found.values()):
        del recipes[stack]
    return found


def set_apart(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Take these for no linear layers (trial.calls)."""
    for name in names:
        model.get_submodule(name).__class__ = Uncalled


def _common_type(regions: Iterable[Region]) -> torch.dtype | None:
    """That of most numbers there; None where there are none."""
    counts = Counter[torch.dtype]()
    for region in regions:
        counts[region.torch_dtype] += math.prod(region.shape)
    return max(counts, key=counts.__getitem__, default=None)


def _linear(module: Conv1D) -> FrozenLinear:
    """The linear layer that GPT-2 calls a convolution: the same weight, looked at the other way round (out, in)."""
    linear = _layer_of(module.weight.data.t())
    linear.bias = module.bias
    return linear


def _layer_of(weight: torch.Tensor) -> FrozenLinear:
    """A layer without bias around a weight (m, n)."""
    linear = FrozenLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def _set(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or a buffer."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def _read(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in read_tensors(folder, names)} if names else {}
