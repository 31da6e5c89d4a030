"""One training step of every architecture of the matrix: what reaches the weights is the update of autograd's gradient.

The truth is plain transformers and plain autograd on the same checkpoint (families.Truth). Its gradient G, handed to
the kernels as the factors D = G^T and X = 1, says where each weight has to be after the step.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from architectures import ARCHITECTURES, Architecture
from families import Truth
from hogwild import apollo, coverage, protection, skeleton
from hogwild.apollo import Optimizer
from hogwild.arena.client import Arena
from hogwild.backward import TiedHead, TrainedLinear
from hogwild.drift import Drift
from hogwild.encoding import Encoded
from hogwild.errors import LossError
from hogwild.layout import Layout
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.trial import Verdict
from hogwild.weights import Weights, digest, load_arena
from hogwild_kernels import UpdateResult, products
from test_streams import Waits

ROWS = [architecture for architecture in ARCHITECTURES if not architecture.refused]
OPTIMIZER = OptimizerConfig(rank=4, lr=0.05, eps=0.01)
"""With an epsilon that many gradients are below, an update is as exact as its gradient, element by element."""


def example(seed: int, context: int, trained: int) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (context + trained,), generator=generator).tolist()
    return Encoded(ids, [False] * context + [True] * trained)


ITEMS = [Item(example(1, 70, 9)), Item(example(2, 5, 12), weight=-0.5)]
"""One to learn, whose context is longer than what goes through with trained tokens (batch.MERGED_CONTEXT), and one to
unlearn, some of whose tokens are unlikely enough as they are."""


@dataclass
class Expected:
    """Losses of the items, and the gradient of the step's loss for each parameter."""

    losses: list[float]
    gradients: Mapping[str, torch.Tensor]

    def gradient(self, name: str) -> torch.Tensor:
        """Of a parameter; of an expert's, a part of the stack's."""
        if name in self.gradients:
            return self.gradients[name]
        stack, number, _ = name.rsplit(".", 2)
        return self.gradients[stack][int(number)]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from its first element to behind its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


class Case:
    """A checkpoint of one architecture, the truth about it, and trainers on it."""

    def __init__(self, architecture: Architecture, root: Path) -> None:
        self.architecture, self._root = architecture, root
        self._folders: dict[torch.dtype, Path] = {}
        self._truths: dict[tuple[str, torch.dtype], Expected] = {}
        self._verdict: Verdict | None = None  # of the model in fp32, as threads of one daemon share it

    def folder(self, dtype: torch.dtype) -> Path:
        if dtype not in self._folders:
            self._folders[dtype] = self.architecture.build(self._root / str(dtype), dtype)
        return self._folders[dtype]

    def truth(self, constants: Any, dtype: torch.dtype) -> Expected:
        """Of the weights in the checkpoint of this type, computed in fp32."""
        if (constants, dtype) not in self._truths:
            folder = self.folder(dtype)
            found = [Truth(folder, i.encoded, constants, torch.float32, weight=i.weight) for i in ITEMS]
            gradients: dict[str, Any] = {}
            for one in found:
                for name, gradient in one.gradients.items():
                    gradients[name] = gradients.get(name, 0) + gradient / len(ITEMS)
            self._truths[constants, dtype] = Expected([one.loss for one in found], gradients)
        return self._truths[constants, dtype]

    def frozen_context(self, done: "Done") -> Expected:
        """The truth where context is frozen, if it can be."""
        recurrent = (
            self.architecture.row == "hybrid"
        )  # Mamba takes its own vectors where no module could be cut
        constants = "none" if not done.trainer.can_freeze else "read" if recurrent else "everywhere"
        return self.truth(constants, done.dtype)

    def setting(
        self, context: Any, dtype: torch.dtype = torch.float32, *, experts: bool = False, **settings: Any
    ) -> "Setting":
        """A new trainer. In the arena lies the whole checkpoint, as `hogwild train` has it; in bf16, what vLLM serves
        as the checkpoint has it."""
        arena, folder = load_arena(self.folder(dtype)), self.folder(dtype)
        # A head that is stored a second time is another weight, unless the server has found it to be the same.
        parts = self.architecture.frozen if dtype == torch.bfloat16 or self.architecture.head else ()
        gone = {n for n in arena.layout.tensors if any(part in n for part in parts)}
        served = {name: region for name, region in arena.layout.tensors.items() if name not in gone}
        layout = replace(arena.layout, tensors=served, frozen=dict.fromkeys(gone, "vLLM keeps it otherwise"))
        weights = Weights(Arena(arena.weights, arena.control, layout))
        model = skeleton.build(folder, weights, apart=experts)
        known = self._verdict if dtype == torch.float32 and not experts else None
        after = {name: weights.at(region) for name, region in skeleton.bound(model).items()}
        optimizer = Optimizer(OPTIMIZER, seed=3)
        trainer = Trainer(
            model, optimizer, Progress(arena.control, 4), set(after), context, seed=0,
            batch_tokens=37, verdict=known, **settings,
        )  # fmt: skip
        trainer._activations = 1 << 30  # one update, with activations computed twice too
        if dtype == torch.float32 and not experts:
            self._verdict = trainer.verdict
        return Setting(trainer, optimizer, weights, layout, after)

    def step(self, context: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> "Done":
        """One step of a new trainer."""
        setting = self.setting(context, dtype, **settings)
        trainer, weights, layout, after = setting.trainer, setting.weights, setting.layout, setting.bound
        model = trainer.model
        before = {name: place.clone() for name, place in after.items()}
        served_before = {name: weights.view(name).clone() for name in weights.names}
        result = trainer.step(ITEMS)
        assert not result.skipped
        told = trainer.frozen.keys()
        assert {name for name, _ in model.named_parameters()} <= told | after.keys()
        trained = [_span(weights.at(r)) for n, r in skeleton.bound(model).items() if n not in told]
        for name, old in served_before.items():
            view = weights.view(name)
            begin, end = _span(
                view
            )  # two tensors of a checkpoint may be one matrix of an expert, or one all of them
            known = any((a <= begin and end <= b) or (begin <= a and b <= end) for a, b in trained)
            assert known or torch.equal(view, old), f"{name} moved, and is not trained"
        return Done(trainer, layout, dtype, result.losses, before, after)


@dataclass
class Setting:
    """A trainer, the weights that it moves, and where those of its parameters are that lie in the arena."""

    trainer: Trainer
    optimizer: Optimizer
    weights: Weights
    layout: Layout
    bound: Mapping[str, torch.Tensor]

    def snapshot(self) -> dict[str, torch.Tensor]:
        """What is served, and the moments."""
        served = {name: self.weights.view(name).clone() for name in self.weights.names}
        moments = self.optimizer.tensors().items()
        return served | {n: one.clone() for n, one in moments if not n.endswith("/counts")}


@dataclass
class Done:
    """What a step has done to the parameters that lie in the arena."""

    trainer: Trainer
    layout: Layout
    dtype: torch.dtype
    losses: list[float]
    before: Mapping[str, torch.Tensor]
    after: Mapping[str, torch.Tensor]

    def moves(self, truth: Expected) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each parameter that is not said to be frozen: how it moved, and how it should have."""
        fresh, found = Optimizer(OPTIMIZER, seed=3), {}
        table = f"{skeleton.table_name(self.trainer.model)}.weight"
        for name, before in self.before.items():
            if name in self.trainer.frozen:
                assert torch.equal(self.after[name], before), f"{name} is said to be frozen"
                continue
            weight, gradient = before.float().clone(), truth.gradient(name)
            if weight.ndim != 2:
                fresh.update_small(name, weight, gradient, 0)
            elif len(tokens := gradient.any(dim=1).nonzero()[:, 0]) < len(weight) and name == table:
                fresh.update_embedding(name, weight, tokens, gradient[tokens], 0)
            else:
                fresh.update_linear(name, weight, torch.eye(weight.shape[1]), gradient.t().contiguous(), 0)
            found[name] = self.after[name].float() - before.float(), weight - before.float()
        return found

    def assert_exact(self, truth: Expected) -> None:
        assert self.losses == pytest.approx(truth.losses, rel=1e-5)
        for name, (moved, wanted) in self.moves(truth).items():
            off = float((moved - wanted).abs().max())
            # No update is steeper in its gradient than this, whose last digits are rounding.
            steepest, scale = OPTIMIZER.lr / OPTIMIZER.eps, float(truth.gradient(name).abs().max())
            assert off <= 1e-3 * float(wanted.abs().max()) + 1e-5 * steepest * scale + 1e-6, name


@pytest.fixture(scope="module", params=ROWS, ids=lambda one: one.name)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("model"))


def test_examples_are_learned_and_unlearned(case):
    """Together with embeddings, whose gradient is the last of a backward pass."""
    done = case.step("full", embeddings=True)
    done.assert_exact(case.truth("none", torch.float32))
    said = coverage.examine(case.folder(torch.float32), done.layout, embeddings=True)
    assert said.trained.keys() == done.before.keys() - done.trainer.frozen.keys(), (
        "what doctor says is trained"
    )


@pytest.mark.parametrize("budget", [0, 1024], ids=["computed twice", "kept"])
def test_examples_go_on_from_frozen_context(case, budget):
    done = case.step("frozen", activation_mib=budget)
    done.assert_exact(case.frozen_context(done))


STACKED = {"Qwen3-Next", "Qwen3-MoE", "OLMoE", "Qwen2-MoE", "Granite-MoE", "GLM4-MoE"}
"""Whose experts lie as one view in a checkpoint. (In a server's arena those of others do, too.)"""


@pytest.mark.parametrize("context", ["full", "frozen"])
def test_experts_are_trained_each_from_the_tokens_that_are_sent_to_it(case, context):
    done = case.step(context, experts=True, activation_mib=0)
    done.assert_exact(case.truth("none", torch.float32) if context == "full" else case.frozen_context(done))
    stacks = {
        name: len(one) for name, one in case.truth("none", torch.float32).gradients.items() if one.ndim == 3
    }
    apart = {name for name in done.before if name not in case.truth("none", torch.float32).gradients}
    reached = {name for name in apart if not torch.equal(done.before[name], done.after[name])}
    if case.architecture.name in STACKED:
        assert len(reached) > len(stacks)
        assert not apart & done.trainer.frozen.keys()
    else:
        assert not apart
    said = coverage.examine(case.folder(torch.float32), done.layout, experts=True)
    assert said.trained.keys() == done.before.keys() - done.trainer.frozen.keys()


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_model_is_trained_in_the_type_that_it_is_served_in(case, multiplies, monkeypatch):
    """On a CPU that multiplies bf16, and on one that does not."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: multiplies or dtype == torch.float32)
    done = case.step("frozen", torch.bfloat16)
    truth = case.frozen_context(done)
    assert done.losses == pytest.approx(truth.losses, rel=0.05)  # rounding sends tokens to other experts
    likeness = []
    for name, (moved, wanted) in done.moves(truth).items():
        rounds_off = bool((wanted.abs() < 2**-7 * done.before[name].abs()).all())
        assert moved.any() or rounds_off, f"{name} has not moved, and is not said to be frozen"
        likeness.append(cosine_similarity(moved.flatten(), wanted.flatten(), dim=0))
    assert torch.stack(likeness).mean() > 0.75


PROTECTED = [[5, 9, 11, 17, 21, 30], [7, 8, 40, 41]]
"""Texts with fewer tokens than a layer has directions to spare, even one that is used twice."""


def test_what_layers_make_of_protected_texts_stays_as_it_was(case):
    """Each of them, whatever it is given and however often, after an update and after drift was taken back."""
    setting, folder = case.setting("frozen", embeddings=True), case.folder(torch.float32)
    reader, moved = skeleton.build(folder, setting.weights), set[str]()
    directions = protection.measure(
        reader, set(setting.bound), PROTECTED, rank=32, budget_bytes=1 << 20, seed=0, embeddings=True
    )
    setting.trainer.protect(directions)
    drift = Drift(setting.weights, reader, folder, every=1)
    drift.protect(directions, digest(folder))
    before = {name: weight.clone() for name, weight in setting.bound.items()}
    setting.trainer.step(ITEMS)
    drift.after(1)
    names = {id(weight): name for name, weight in reader.named_parameters()}

    def look(module: Any, arguments: Any, _output: Any) -> None:
        name, x = names[id(module.weight)], arguments[0].flatten(0, -2)
        if name in before and x.shape[1] > 32:  # of fewer inputs not every direction can be kept
            change = module.weight - before[name]
            assert (x @ change.T).norm() <= 1e-4 * x.norm() * change.norm(), name
            if change.any():
                moved.add(name)

    for module in reader.modules():
        if skeleton.is_linear(module):
            module.register_forward_hook(look)
    weights = {name: reader.get_parameter(name).clone() for name in before}
    for text in PROTECTED:
        reader(torch.tensor([text]), use_cache=False)
    assert all(torch.equal(reader.get_parameter(name), weight) for name, weight in weights.items())
    linears = {
        f"{linear.name}.weight": linear
        for linear in setting.trainer._gather.linears
        if linear.in_features > 32
    }
    assert moved >= {name for name, linear in linears.items() if not isinstance(linear, TiedHead)}


def split(trainer: Trainer, passes: str) -> None:
    if passes != "one pass":
        trainer._batch_tokens = 1
    if passes == "two updates":
        trainer._activations = 0


@pytest.mark.parametrize("passes", ["one pass", "two passes", "two updates"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_step_that_is_refused_late_writes_nothing(case, passes, bad):
    """As on a GPU, where the updates are queued before the host has seen the losses. The other item has a gradient that
    is good, in a pass before that of the bad one or after it, and experts of its own."""
    experts = case.architecture.name in STACKED
    settings = [case.setting("frozen", experts=experts, embeddings=True) for _ in range(2)]
    for setting in settings:
        setting.trainer.stream.waits = True
        setting.trainer.step(
            ITEMS
        )  # or there would be no momentum that could move a weight without a gradient
        split(setting.trainer, passes)
    refused, never = settings
    trainer, before = refused.trainer, refused.snapshot()
    items = [replace(item, weight=1.0 if index == bad else -1.0) for index, item in enumerate(ITEMS)]
    trainer._max_loss = 0.0  # which is not asked of what is unlearned
    with pytest.raises(LossError):
        trainer.step(items)
    assert trainer.progress.steps == 1
    after = refused.snapshot()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == set()
    trainer._max_loss = math.inf
    assert trainer.step(items).losses == never.trainer.step(items).losses
    after = refused.snapshot()
    assert all(torch.equal(after[name], tensor) for name, tensor in never.snapshot().items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("passes", ["one pass", "two passes"])
def test_an_expert_that_context_alone_reaches_is_left_alone_by_a_refused_step(tmp_path, passes, monkeypatch):
    """Nothing of the loss gets there, NaN neither; and what an earlier pass sent to it is good."""
    mixture = next(one for one in ARCHITECTURES if one.name == "Qwen3-MoE")
    setting, without = Case(mixture, tmp_path).setting("frozen", experts=True), list[str]()
    trainer, receive = setting.trainer, TrainedLinear.receive

    def noted(linear: TrainedLinear, x: torch.Tensor, d: torch.Tensor) -> None:
        if linear.stack and not trainer._gather.more and not d.any():
            without.append(linear.name)
        receive(linear, x, d)

    monkeypatch.setattr(TrainedLinear, "receive", noted)
    trainer.stream.waits = True
    split(trainer, passes)
    items = [Item(example(1, 63, 2))]
    if passes != "one pass":
        items.insert(0, Item(example(3, 5, 50), weight=-1.0))
    trainer.step([Item(example(4, 0, 60))])
    without.clear()
    before, trainer._max_loss = setting.snapshot(), 0.0
    with pytest.raises(LossError):
        trainer.step(items)
    assert without, "what this is about"
    after = setting.snapshot()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == set()


def test_an_embedding_that_protected_tokens_alone_reach_is_left_alone_by_a_refused_step(tmp_path):
    """Of the last pass; what an earlier one has kept is good."""
    llama = next(one for one in ARCHITECTURES if one.name == "Llama")
    setting, refused = Case(llama, tmp_path).setting("frozen", embeddings=True), example(1, 63, 2)
    trainer, items = setting.trainer, [Item(example(3, 5, 50), weight=-1.0), Item(refused)]
    trainer.stream.waits = True
    split(trainer, "two passes")
    table = skeleton.table_name(trainer.model)
    trainer.protect({table: torch.tensor(sorted(set(refused.ids[62:64])))})
    trainer.step(items)
    before, trainer._max_loss = setting.snapshot(), 0.0
    with pytest.raises(LossError):
        trainer.step(items)
    after = setting.snapshot()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == set()
    trainer._max_loss = math.inf
    trainer.step(items)
    assert not torch.equal(setting.snapshot()[f"{table}.weight"], before[f"{table}.weight"]), "it is trained"


LOOKS = {"Jamba", "GPT-2"}
"""Where transformers itself looks at numbers of the device in each pass that is given no mask: whether a row holds
several texts, or padding."""


@pytest.mark.parametrize("passes", ["one pass", "two passes", "two updates"])
def test_a_step_makes_the_host_wait_once(case, passes, monkeypatch):
    """On a GPU; seen on a CPU by the operators that would."""

    def update(*_given: Any, **_options: Any) -> UpdateResult:
        return UpdateResult(torch.tensor(0.5), torch.tensor(False))

    monkeypatch.setattr(apollo, "apollo_update", update)
    monkeypatch.setattr(apollo, "adam_update", update)
    trainer = case.setting("frozen").trainer
    trainer.stream.waits = True
    split(trainer, passes)
    bare = []

    def look(_module: Any, _arguments: Any, options: Mapping[str, Any]) -> None:
        bare.append("attention_mask" not in options)

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    with Waits(monkeypatch) as waits:
        trainer.step(ITEMS)
    looks = sum(bare) if case.architecture.name in LOOKS else 0
    assert waits.found == Counter(tolist=1, _local_scalar_dense=looks)
