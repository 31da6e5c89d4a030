"""How far two ways of computing one model may lie apart, and which module is to blame when they lie farther.

Server and trainer never agree to the last bit: they multiply in another order and round at other places. What that
makes differs by a factor of ten between models, so it is measured on the model, at the moment of the comparison. A
module that the server no longer reads still has the weights that it was loaded with: the trainer computes with those
of one module after the other, and the one that explains the difference is named.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hogwild import pulse, skeleton

FLOOR = 0.03
"""Nats: a model whose rounding makes less than this still differs by so much where kernels do."""
FACTOR = 2.0
"""How many times the difference that rounding makes is accepted. Over the rows of the architecture matrix: up to 1.2;
with Qwen2-MoE, Phi-MoE and Gemma 4, 2.0 to 2.4 over 10 or 29 tokens, which `allowed` takes in."""
_SCATTER = 1.5
"""The mean over n tokens may lie above FACTOR by this over sqrt(n), relatively: four standard deviations of a normal
rounding's size (0.76 of its mean)."""
_SAME = 1e-3
"""Nats: log-probabilities that round to one multiple of it are taken for one."""
_EXPLAINS, _RESOLVED = 0.25, 0.1
"""Shares of the difference that may be left for modules to be named, and at which no more are looked for."""
_TOGETHER = 12
"""Modules that are tried together at most."""

Forward = Callable[[PreTrainedModel, Sequence[int]], Tensor]
"""Log-probabilities of a text's tokens after the first, (L - 1,)."""


@contextmanager
def rounded(model: PreTrainedModel) -> Iterator[None]:
    """While this is open, every output of a module with weights is off by up to a rounding to bf16, at random."""
    generator = torch.Generator(device=model.device).manual_seed(0)

    def disturb(_module: object, _arguments: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        off = torch.rand(output.shape, generator=generator, device=output.device) - 0.5
        return (output.float() * (1 + off * 2**-7)).to(output.dtype)

    hooks = [
        module.register_forward_hook(disturb)
        for module in model.modules()
        if next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tolerance(model: PreTrainedModel, prompts: Sequence[Sequence[int]], forward: Forward) -> float:
    """Mean difference in nats over all of these texts that is no more than rounding, for this model."""
    return max(FLOOR, FACTOR * noise(model, prompts, forward))


def noise(model: PreTrainedModel, prompts: Sequence[Sequence[int]], forward: Forward) -> float:
    """Mean difference in nats that roundings at other places make."""
    plain = [forward(model, prompt) for prompt in prompts]
    with rounded(model):
        again = [forward(model, prompt) for prompt in prompts]
    return float(torch.cat([(a - b).abs() for a, b in zip(plain, again, strict=True)]).mean())


def allowed(tolerance: float, values: Tensor) -> float:
    """The tolerance, in nats, for the mean over tokens of these log-probabilities: the fewer, the more it scatters.
    Tokens of one log-probability, as of a model that does not look at its input, share one rounding and count as one.
    """
    return tolerance * (1 + _SCATTER / math.sqrt(len(torch.unique((values / _SAME).round()))))


def suspects(
    model: PreTrainedModel, folder: Path, prompt: Sequence[int], answer: Tensor, forward: Forward
) -> list[str]:
    """Modules whose older weights, those in `folder`, explain what the server answered; the likeliest first.

    One forward pass for each module that has moved; training has stopped by then.

    Args:
        answer: (L - 1,) the server's log-probabilities of the prompt's tokens after the first.
    """
    modules: dict[str, list[str]] = {}
    for name in skeleton.bound(model):
        modules.setdefault(skeleton.origin(model, name).rpartition(".")[0], []).append(name)

    def left(*those: str) -> float:
        pulse.beat()
        with skeleton.older(model, folder, [name for module in those for name in modules[module]]):
            return float((forward(model, prompt) - answer).abs().mean())

    off = left()
    alone = {module: left(module) for module, names in modules.items() if _moved(model, folder, names)}
    helpful = sorted((module for module in alone if alone[module] < off), key=lambda module: alone[module])
    found, best = list[str](), off
    for module in helpful[:_TOGETHER]:  # one after the other, as what vLLM has fused is dead together
        if best < _RESOLVED * off:
            break
        if (now := left(*found, module)) < best:
            found, best = [*found, module], now
    return found if best < _EXPLAINS * off else []


def _moved(model: PreTrainedModel, folder: Path, names: Sequence[str]) -> bool:
    live = [model.get_parameter(name).data for name in names]
    with skeleton.older(model, folder, names):
        return any(
            not torch.equal(model.get_parameter(name), now) for name, now in zip(names, live, strict=True)
        )
