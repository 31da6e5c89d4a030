"""The losses of one training step, and whether they may move weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hogwild.batch import Work
from hogwild.errors import LossError
from hogwild.streams import put


class StepLosses:
    """The mean loss of each item of one step, and whether the step may move weights.

    On a CPU a loss that must not be trained ends the step before its backward pass. A GPU has not come to it by then,
    and its host does not wait: there every token's gradient is multiplied by `factor`, which such a loss makes NaN,
    and an update about which anything is not finite leaves its weight alone. The host hears of it at the end.

    Args:
        items: of the step.
        max_loss: nats a trained token, of an item that is not to be unlearned.
        late: are losses read at the end of the step?

    Attributes:
        factor: () fp32, 1 or NaN, of all that has been noted; None: the gradients are good as they are.
    """

    def __init__(self, items: int, max_loss: float, late: bool) -> None:
        self._items, self._max_loss, self._late = items, max_loss, late
        self._noted = list[Work]()
        self._means = list[Tensor]()
        self.factor: Tensor | None = None

    def note(self, group: Sequence[Work], found: Sequence[Tensor]) -> None:
        """What goes through the model together, and the losses (T,) of the trained tokens of each.

        Raises:
            LossError: one of them must not be trained. Never if losses are read late.
        """
        means = torch.stack([nll.detach().mean() for nll in found])
        limits = [math.inf if one.weight < 0 else self._max_loss for one in group]
        fine = means.isfinite() & (means <= put(torch.tensor(limits, dtype=torch.float64), means.device))
        self._noted += group
        self._means.append(means)
        if self._late:
            factor = torch.ones_like(means).masked_fill(~fine, math.nan).prod()
            self.factor = factor if self.factor is None else self.factor * factor
        elif not fine.all():
            raise self._refusal(torch.cat(self._means).tolist())

    def gated(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same losses, but gradients that pass back through them are multiplied by `factor`; also those of a token
        that counts no more (`bounded_loss`), or a weight that only such tokens reach would take them for an update."""
        if self.factor is None:
            return found
        return [_Gated.apply(nll, self.factor) for nll in found]  # type: ignore[no-untyped-call]

    def numbers(self) -> Tensor:
        """(1 + items,) fp32, on the device: what `read` wants to have read."""
        factor = self._means[0].new_ones(()) if self.factor is None else self.factor
        return torch.cat([factor[None], *self._means])

    def read(self, numbers: Sequence[float]) -> list[float]:
        """The loss of each item, in their order.

        Raises:
            LossError: one of them must not be trained; no weight has been written.
        """
        factor, *means = numbers
        if math.isnan(factor):
            raise self._refusal(means)
        losses = [0.0] * self._items
        for one, mean in zip(self._noted, means, strict=True):
            losses[one.index] = mean
        return losses

    def _refusal(self, means: Sequence[float]) -> LossError:
        pairs = zip(means, self._noted, strict=True)
        loss = next(mean for mean, one in pairs if not trainable(mean, one.weight, self._max_loss))
        return LossError(f"the loss of a training step is {loss:.4g} nats a token")


def trainable(loss: float, weight: float, max_loss: float) -> bool:
    """Is the mean loss of an item, nats a trained token, one that may move weights? What is to be unlearned may be as
    unlikely as it likes."""
    return math.isfinite(loss) and (weight < 0 or loss <= max_loss)


class _Gated(torch.autograd.Function):
    """Values as they are, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None
