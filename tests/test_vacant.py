"""Parameters without memory while a model is built, as vLLM builds it on a GPU; here on a CPU, where it is the same."""

import pytest
import torch
from torch import nn

from hogwild.arena.memory import Segment
from hogwild.errors import VerificationError
from hogwild.vllm_plugin import place
from hogwild.vllm_plugin.vacant import building

WIDE = 600  # squared, in fp32: above what keeps its memory


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDE, WIDE)  # initialises its weight after it has registered it
        self.norm = nn.Parameter(torch.ones(WIDE))
        self.down = nn.Parameter(torch.empty(WIDE, WIDE + 8))
        self.turned = self.down.data.t()  # a plain attribute over a parameter's storage


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.held: list[int] = []
        self.embed = nn.Embedding(2 * WIDE, WIDE)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(Layer())
            self.held.append(resident(self))
        self.head = nn.Linear(WIDE, 2 * WIDE, bias=False)
        self.head.weight = self.embed.weight
        self.last = nn.Parameter(torch.empty(WIDE, WIDE))


def resident(model: nn.Module) -> int:
    """Bytes that the large parameters take now."""
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(size for size in storages.values() if size >= 1 << 20)


def test_only_what_is_under_construction_takes_memory():
    with building() as vacancies:
        model = Model()
    assert model.held == [0, 0, 0]
    assert resident(model) == model.last.nbytes, "of the outermost module, which is put into no other"
    vacancies.vacate(model)
    assert resident(model) == 0
    assert min(Model().held) > 6 * WIDE * WIDE, "the control experiment"


def test_what_is_small_keeps_its_content():
    with building():
        model = Model()
    assert bool((model.layers[0].norm == 1).all())
    assert bool(model.layers[1].up.bias.abs().sum() > 0)


def test_the_arena_is_planned_as_it_would_be_with_all_memory_there():
    with building() as vacancies:
        model = Model()
    vacancies.vacate(model)
    regions, nbytes = place.plan(model, vacancies.nbytes)
    assert (regions, nbytes) == place.plan(Model())
    assert regions["layers.1.turned"].offset == regions["layers.1.down"].offset
    assert regions["head.weight"] == regions["embed.weight"]
    with pytest.raises(AssertionError):
        assert place.plan(model)[0].keys() == regions.keys()  # without knowing what they had


def test_a_vacant_model_moves_into_the_arena_and_works_there():
    with building() as vacancies:
        model = Model()
    vacancies.vacate(model)
    regions, nbytes = place.plan(model, vacancies.nbytes)
    segment = Segment.allocate(nbytes)
    place.move(model, regions, segment, vacancies.nbytes)
    layer = model.layers[2]
    with torch.no_grad():
        layer.down.copy_(torch.arange(layer.down.numel()).view(layer.down.shape))
    assert layer.turned[3, 5] == 5 * (WIDE + 8) + 3
    assert torch.equal(
        segment.tensor(regions["layers.2.down"].offset, layer.down.shape, layer.down.stride(), torch.float32),
        layer.down,
    )
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert len(place.live_extents(model, segment)) >= len(regions)


def test_a_vacant_model_that_does_not_fit_the_arena_is_refused():
    """As when a server is started again with a model that has one parameter more."""
    with building() as vacancies:
        model = Model()
    vacancies.vacate(model)
    regions, nbytes = place.plan(model, vacancies.nbytes)
    del regions["last"]
    with pytest.raises(VerificationError, match="last is in the model and not in the arena"):
        place.move(model, regions, Segment.allocate(nbytes), vacancies.nbytes)


class Late(nn.Module):
    """Touches a part of it that is finished, as some models do, and vLLM does with all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(WIDE, WIDE, bias=False)
        weight = self.part.weight
        self.view = weight.data.view(-1)[: WIDE * 8]
        nn.init.zeros_(weight)
        self.copy = weight.detach().clone()
        self.noted = weight.data.to("meta")
        self.pair = torch.cat([weight.data, weight.data])
        with pytest.raises(RuntimeError, match="must match the size"):
            weight.data.add_(torch.ones(3, WIDE))  # an operator that fails


def test_an_operator_has_the_memory_of_what_it_is_given_and_only_while_it_runs():
    with building() as vacancies:
        late = Late()
        assert resident(late) == 0
        outer = nn.Sequential(late)
    assert resident(outer) == 0
    assert vacancies.nbytes(late.part.weight.untyped_storage()) == 4 * WIDE * WIDE
    assert late.view.untyped_storage()._cdata == late.part.weight.untyped_storage()._cdata
    assert late.copy.untyped_storage().nbytes() == 4 * WIDE * WIDE, (
        "what an operator makes is an ordinary tensor"
    )


def test_afterwards_modules_are_as_ever():
    with building():
        pass
    assert Model().held[-1] > 0
    broken = nn.Linear(WIDE, WIDE)
    with pytest.raises(ZeroDivisionError), building():
        1 / 0  # noqa: B018 - whatever a model's constructor raises
    assert nn.Sequential(broken)[0].weight.untyped_storage().nbytes() > 0


def test_weights_on_several_devices_are_refused_with_one_of_each():
    model = nn.ModuleDict({"here": nn.Linear(2, 2), "there": nn.Linear(2, 2)})
    assert place.device(model) == torch.device("cpu")
    assert place.device(nn.ModuleDict()) == torch.device("cpu")

    class Elsewhere:
        """A parameter of a device that this machine has not."""

        device = torch.device("cuda", 1)

        def is_floating_point(self) -> bool:
            return True

    named = [*model.named_parameters(), ("gone.weight", Elsewhere())]
    model.named_parameters = lambda: iter(named)  # type: ignore[method-assign,assignment]
    with pytest.raises(VerificationError) as refused:
        place.device(model)
    assert refused.value.problems == [
        "here.weight, for one, is on cpu",
        "gone.weight, for one, is on cuda:1",
    ]
