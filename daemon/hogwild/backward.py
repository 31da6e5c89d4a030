"""Updates each layer inside its own backward pass, so that no gradient matrix and no full backward graph is kept."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hogwild import experts, naming, pulse, skeleton
from hogwild.apollo import Optimizer
from hogwild.embedding import TrainedEmbedding
from hogwild_kernels import UpdateResult, products

OnUpdate = Callable[[str, UpdateResult], None]

PROTECTED = "protected: it acts on every text alike"
"""Why what is no matrix is left as it is where updates leave general text alone."""


class _UpdatedLinear(torch.autograd.Function):
    """y = x W^T, whose backward updates W once the gradient of x has been computed from it.

    The weight is no input of the function and is not saved by it, so autograd neither computes a gradient matrix nor
    minds that the weight has changed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "TrainedLinear") -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.rows = layer.gather.of_pass(x)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(flat if ctx.rows is None else flat[ctx.rows])
        return products.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        layer: TrainedLinear = ctx.layer
        d = d.reshape(-1, d.shape[-1])
        if ctx.rows is None:
            dx = products.input_gradient(d, layer.weight)
        else:
            d = d[ctx.rows]
            dx = d.new_zeros(ctx.shape[:-1].numel(), ctx.shape[-1])
            dx[ctx.rows] = products.input_gradient(d, layer.weight)
        layer.receive(x.detach(), d)  # or rows that wait would keep the graph, and with it the contexts
        return dx.view(ctx.shape), None


class _Kept:
    """What a layer has of this step so far; an attribute of a module takes Python ten times as long to set.

    Attributes:
        pending: forward passes whose backward pass is still to come.
        rows: X and D of those whose backward pass has been.
    """

    __slots__ = ("pending", "rows")

    def __init__(self) -> None:
        self.pending = 0
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []


class TrainedLinear(torch.nn.Module):
    """Takes the place of a `torch.nn.Linear` in a trainer's skeleton."""

    def __init__(
        self,
        name: str,
        linear: torch.nn.Linear,
        trains_bias: bool,
        optimizer: Optimizer,
        seed: int,
        on_update: OnUpdate,
        gather: "Gather",
        uses: int = 1,
    ) -> None:
        """`uses`: layers of the model that have the weight. If several, it is updated at the end of the step, not in
        its backward pass."""
        super().__init__()
        self.trains_bias, self.uses, self.waits = trains_bias, uses, uses > 1
        self.rows = 0.0
        """Inputs for each token of a pass, as far as the model's code has been seen to call it."""
        self.name, self.optimizer, self.seed, self.on_update = name, optimizer, seed, on_update
        self.gather = gather
        self.protected: torch.Tensor | None = None
        """(k, n) directions of the input that updates leave alone (protection.py)."""
        self._kept = _Kept()
        self.stack: int = getattr(linear, "stack", 0)
        """Of an expert: how many there are in its layer."""
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pulse.beat()
        if not torch.is_grad_enabled():
            return products.linear(x, self.weight, self.bias)
        self._kept.pending += 1
        result: torch.Tensor = _UpdatedLinear.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def receive(self, x: torch.Tensor, d: torch.Tensor) -> None:
        """x (T, n) input, d (T, m) gradient of the output, of one forward pass. Updates once all are there."""
        pulse.beat()
        kept = self._kept
        kept.rows.append((x, d))
        kept.pending -= 1
        if kept.pending == 0 and not self.gather.more and not self.waits:
            # Of the last pass an expert may have constants alone, which no refused loss reaches.
            self.update(self.gather.factor if self.stack else None)

    def take(self, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """X (T, n) without its protected part and D (T, m), times `factor`, of forward passes since the last, once."""
        kept = self._kept
        if not (rows := kept.rows):
            return None
        kept.rows = []
        x, d = rows[0] if len(rows) == 1 else (torch.cat(part) for part in zip(*rows, strict=True))
        d = d if factor is None else d * factor
        x = x if self.protected is None else products.without(x, self.protected)
        return self.gather.unscaled(x, d)

    @property
    def row_nbytes(self) -> int:
        """Bytes that it keeps of one token, at most."""
        each = (self.in_features + self.out_features) * (self.gather.itemsize or self.weight.element_size())
        return int((self.rows or self.uses) * each)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of the rows of forward passes since the last update."""
        return sum(x.nbytes + d.nbytes for x, d in self._kept.rows)

    def update(self, factor: torch.Tensor | None = None) -> None:
        """One update from the rows of every forward pass since the last one; see `Gather.finish`."""
        if (taken := self.take(factor)) is None:
            return
        (x, d), protects = taken, self.protected is not None
        name, w = f"{self.name}.weight", self.weight.data
        self.on_update(name, self.optimizer.update_linear(name, w, x, d, self.seed, one_scale=protects))
        self.update_bias(d)

    def update_bias(self, d: torch.Tensor) -> None:
        """One update of the bias from d (T, m), if it is trained."""
        if self.trains_bias:
            name = f"{self.name}.bias"
            self.on_update(name, self.optimizer.update_small(name, self.bias.data, d.sum(0), self.seed))

    def forget(self) -> None:
        """Drop what a pass that failed half-way has left."""
        self._kept.pending, self._kept.rows = 0, []


class TiedHead(TrainedLinear):
    """A head whose weight is the input embedding's, which takes its rows and updates from both uses (embedding.py)."""

    def update(self, factor: torch.Tensor | None = None) -> None:
        """Nothing yet: the gradient of the embedding is still to come."""


class Gather:
    """Several backward passes that end in one update of every weight.

    While `more` is set, the rows of X and D of linear layers and the gradients of small weights are kept; the
    backward pass that runs without it updates each weight with everything that was kept, layer by layer as it goes.

    Attributes:
        rows: tokens of the pass, and which of them are trained; the others are constants: a linear layer passes no
            gradient back through them and is not updated from them. None: all are trained. A layer that gets another
            number of rows (the output head) gets trained tokens only.
        context: tokens that were read beforehand. A layer that gets those of the pass behind them (MLA expands its
            cache anew each time) is one whose first rows are constants.
        embedding: the input embedding, if it is trained.
        itemsize: bytes of a number in the rows; 0: as of the weight, which activations may be wider than.
        scale: how many times too large the gradients of this step are, for 16 bits that have no small numbers (fp16).
        factor: () of all passes so far, see `finish`.
        frozen: what is not trained: name -> why.
    """

    def __init__(self) -> None:
        self.more = False
        self.rows: tuple[int, torch.Tensor | None] = 0, None
        self.context = 0
        self.linears: list[TrainedLinear] = []
        self.embedding: TrainedEmbedding | None = None
        self.itemsize, self.scale = 0, 1.0
        self.factor: torch.Tensor | None = None
        self.small: dict[str, Callable[[torch.Tensor | None], None]] = {}
        self.drops: list[Callable[[], None]] = []
        self.frozen: dict[str, str] = {}

    @property
    def row_nbytes(self) -> int:
        """Bytes that all linear layers together keep of one token, at most, while `more` is set."""
        return sum(linear.row_nbytes for linear in self.linears)

    @property
    def waiting_nbytes(self) -> int:
        """Bytes that they keep now, for an update that is still to come."""
        return sum(linear.kept_nbytes for linear in self.linears)

    def begin(self, scale: float = 1.0) -> None:
        """Before the first forward pass of a step."""
        self.more, self.rows, self.context, self.scale, self.factor = False, (0, None), 0, scale, None
        for linear in self.linears:
            linear.forget()
        if self.embedding is not None:
            self.embedding.forget()

    def unscaled(self, x: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of a gradient of this step as they should be, which then takes more than 16 bits."""
        # In place: D of a head is the largest of all.
        return (x, d) if self.scale == 1.0 else (x.float(), d.to(torch.float32, copy=True).div_(self.scale))

    def of_pass(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which rows of a layer's input (..., T, n) are of trained tokens; None: all."""
        (tokens, rows), length = self.rows, x.shape[:-1].numel()
        if length == tokens:
            return rows
        if self.context and x.ndim > 2 and length == x.shape[-2] == self.context + tokens:
            new = torch.arange(tokens, device=x.device) if rows is None else rows
            return self.context + new
        return None

    def forget(self) -> None:
        """The step is given up: nothing that was kept will move a weight."""
        for linear in self.linears:
            linear.forget()
        for drop in self.drops:
            drop()
        if self.embedding is not None:
            self.embedding.forget()

    def finish(self, factor: torch.Tensor | None = None) -> None:
        """After the last backward pass of a step: update what it has not reached (an expert that got no token).

        `factor`: () of the gradients of earlier passes, which did not know it yet (step_losses.py).
        """
        for linear in self.linears:
            linear.update(factor)
        for apply in self.small.values():
            apply(factor)
        if self.embedding is not None:
            self.embedding.update(factor)


def train_in_backward(
    model: PreTrainedModel,
    optimizer: Optimizer,
    trainable: set[str],
    seed: int,
    on_update: OnUpdate,
    sources: Mapping[str, torch.Tensor],
    embeddings: bool = False,
    rows: Mapping[str, float] | None = None,
) -> Gather:
    """Make a backward pass through `model` update its weights. One that several layers share is updated at the end of
    the step, when all of them have been computed for the last time (recompute.py).

    Args:
        model: a skeleton of views, changed in place.
        trainable: names of the tensors that lie in the arena.
        seed: varies the rounding between threads.
        on_update: called after each weight's update, with its name and result.
        sources: name -> the weight to update, of parameters of the model that are private copies.
        embeddings: train the input embedding, and a head that is tied to it.
        rows: of each linear layer, inputs for each token of a pass (`trial.Calls`); None: one.

    Returns:
        How several backward passes are made to end in one update, and what stays frozen.
    """
    gather = Gather()
    frozen = gather.frozen
    frozen.update(
        dict.fromkeys(naming.buffers(model), "a buffer of the model's code, which gets no gradient")
    )
    table = model.get_input_embeddings()
    tied, heads = {id(table.weight)}, list[TiedHead]()
    why_not = _why_not(model, table, trainable) if embeddings else "embeddings are frozen"
    if not why_not:
        gather.embedding = TrainedEmbedding(
            skeleton.table_name(model),
            skeleton.weight_name(model, table),
            table,
            optimizer,
            seed,
            on_update,
            gather,
        )
    model.enable_input_require_grads()  # frozen embeddings give no gradient; the first layer needs one to pass on
    shared: dict[int, TrainedLinear] = {}  # weight -> its layer, which sees every use of it before it updates
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, module in list(model.named_modules()):
        if skeleton.is_linear(module):
            weight, bias = f"{name}.weight", f"{name}.bias"
            is_tied = id(module.weight) in tied
            first = shared.get(id(module.weight))
            if first is not None and first.bias is module.bias:
                first.rows += (rows or {}).get(name, 0)
                _put(model, name, first)
                continue
            if is_tied and why_not:
                frozen[weight] = "tied to the embeddings, which are frozen"
            elif not is_tied and weight not in trainable:
                frozen[weight] = "not in the arena"
            else:
                trains_bias = module.bias is not None and bias in trainable
                kind = TiedHead if is_tied else TrainedLinear
                times = uses[id(module.weight)] - is_tied  # the embedding keeps no rows
                trained = kind(name, module, trains_bias, optimizer, seed, on_update, gather, times)
                trained.rows = (rows or {}).get(name, 0)
                gather.linears.append(trained)
                if isinstance(trained, TiedHead):
                    heads.append(trained)
                else:
                    shared[id(module.weight)] = trained
                _put(model, name, trained)
            if module.bias is not None and (weight in frozen or bias not in trainable):
                frozen[bias] = "its weight is frozen" if bias in trainable else "not in the arena"
        elif not isinstance(module, TrainedLinear):
            for leaf, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{leaf}" if name else leaf
                if id(parameter) in tied:
                    if why_not:
                        frozen[full] = why_not
                elif isinstance(module, torch.nn.Embedding):
                    frozen[full] = "embeddings of something else than tokens" if embeddings else why_not
                elif full not in trainable:
                    frozen[full] = "not in the arena"
                elif parameter.ndim == 2 and isinstance(module, skeleton.Uncalled):
                    frozen[full] = "multiplied by the model's own code, which does not call the layer"
                elif parameter.ndim == 2:
                    frozen[full] = f"a matrix of {type(module).__name__}, which is not a linear layer"
                elif parameter.ndim > 2 and min(parameter.shape[1:]) > 1:  # a convolution has an axis of one
                    how = " (training.experts)" if experts.stacks(module) else ""
                    frozen[full] = (
                        f"the stacked matrices of {type(module).__name__}: served live, not trained{how}"
                    )
                else:
                    source, waits = sources.get(full, parameter.data), uses[id(parameter)] > 1
                    _train_small(full, parameter, source, optimizer, seed, on_update, gather, waits)
    if gather.embedding is not None:
        gather.embedding.heads = heads
    return gather


def _put(model: PreTrainedModel, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _why_not(model: PreTrainedModel, table: torch.nn.Module, trainable: set[str]) -> str:
    """Why the input embedding cannot be trained; "" if it can."""
    if not isinstance(table, torch.nn.Embedding):
        return f"a {type(table).__name__}, which is no plain table of rows"
    if skeleton.weight_name(model, table) not in trainable:
        return "not in the arena"
    if twins := [name for name in skeleton.stored_twice(model) if model.get_parameter(name) is table.weight]:
        return f"stored a second time, as {', '.join(twins)}: a checkpoint would hold another head than is served"
    return ""


def _train_small(
    name: str,
    parameter: torch.nn.Parameter,
    weight: torch.Tensor,
    optimizer: Optimizer,
    seed: int,
    on_update: OnUpdate,
    gather: Gather,
    waits: bool,
) -> None:
    """Adam on `weight` as soon as autograd has this parameter's whole gradient, which is dropped at once; or, if it
    `waits`, at the end of the step."""

    def apply(factor: torch.Tensor | None) -> None:
        if (grad := parameter.grad) is not None:
            grad = grad if factor is None else grad * factor
            grad = grad if gather.scale == 1.0 else grad.float() / gather.scale
            on_update(name, optimizer.update_small(name, weight, grad, seed))
            parameter.grad = None

    # Hooks are the one thing of a tensor that Python's collector does not see into: what they refer to by a way that
    # leads back to the tensor stays for ever, here the whole model and its arena.
    alive = weakref.ref(gather)

    def accumulated(_p: torch.Tensor) -> None:
        if (there := alive()) is not None and not there.more and not waits:
            there.small[name](None)

    def drop() -> None:
        parameter.grad = None

    gather.small[name] = apply
    gather.drops.append(drop)
    parameter.requires_grad_(True)
    parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]  # torch leaves it untyped
