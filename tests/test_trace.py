"""Where parameters and checkpoint tensors lie in the arena, on small modules that load as vLLM's do."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from torch import nn

from hogwild.arena.memory import Segment
from hogwild.errors import VerificationError
from hogwild.layout import Region
from hogwild.vllm_plugin import place
from hogwild.vllm_plugin.trace import CopyTrace


def load(
    model: nn.Module,
    checkpoint: Mapping[str, torch.Tensor],
    rules: Mapping[str, Callable[[torch.Tensor], None]],
) -> tuple[Segment, dict[str, Region], dict[str, str]]:
    """Move the model into an arena and load it; `rules` say what the model does with each checkpoint tensor."""
    regions, nbytes = place.plan(model)
    segment = Segment.allocate(nbytes)
    place.move(model, regions, segment)
    trace = CopyTrace(segment)
    with trace:
        for name, tensor in trace.watch(checkpoint.items()):
            rules[name](tensor)
    return segment, *trace.result()


def view(segment: Segment, region: Region) -> torch.Tensor:
    return segment.tensor(region.offset, region.shape, region.stride, region.torch_dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# --- trace ---------------------------------------------------------------------------------------------------------


def test_fused_projections_are_mapped_to_their_rows():
    """As vLLM's QKVParallelLinear loads: param.data.narrow(...).copy_(tensor)."""
    model = nn.Linear(8, 6 + 2 + 2, bias=False)
    checkpoint = {"q": random(6, 8), "k": random(2, 8), "v": random(2, 8) + 1}
    starts = {"q": 0, "k": 6, "v": 8}
    segment, mapped, unmapped = load(
        model,
        checkpoint,
        {
            name: lambda t, start=start: model.weight.data.narrow(0, start, len(t)).copy_(t)
            for name, start in starts.items()
        },
    )
    assert not unmapped
    for name, tensor in checkpoint.items():
        assert torch.equal(view(segment, mapped[name]), tensor)
    view(segment, mapped["k"]).zero_()  # what is trained is what is served
    assert not model.weight[6:8].any()
    assert torch.equal(model.weight[:6], checkpoint["q"])


def test_a_transposed_copy_is_mapped_in_the_checkpoints_shape():
    model = nn.Linear(5, 3, bias=False)
    checkpoint = {"w": random(5, 3)}  # stored as (n, m), as GPT-2 does
    segment, mapped, _ = load(model, checkpoint, {"w": lambda t: model.weight.data.copy_(t.t())})
    assert mapped["w"].shape == (5, 3)
    assert mapped["w"].stride == (1, 5)
    assert torch.equal(view(segment, mapped["w"]), checkpoint["w"])


def test_a_square_transposed_copy_is_not_taken_for_a_plain_one():
    model = nn.Linear(4, 4, bias=False)
    checkpoint = {"w": random(4, 4)}
    segment, mapped, _ = load(model, checkpoint, {"w": lambda t: model.weight.data.copy_(t.t())})
    assert torch.equal(view(segment, mapped["w"]), checkpoint["w"])
    assert not torch.equal(model.weight, checkpoint["w"])


def test_a_permuted_convolution_is_mapped():
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 3, 2))])
    checkpoint = {"conv": random(2, 3, 4)}
    segment, mapped, _ = load(model, checkpoint, {"conv": lambda t: model[0].data.copy_(t.permute(2, 1, 0))})
    assert torch.equal(view(segment, mapped["conv"]), checkpoint["conv"])


def test_a_tensor_that_is_not_contiguous_in_the_checkpoint_is_mapped():
    """A view of a larger read buffer, as some loaders hand out."""
    model = nn.Linear(4, 3, bias=False)
    buffer = random(4, 6)
    checkpoint = {"w": buffer[:, 1:4].t()}
    segment, mapped, _ = load(model, checkpoint, {"w": lambda t: model.weight.data.copy_(t)})
    assert torch.equal(view(segment, mapped["w"]), checkpoint["w"])


def test_a_cast_by_the_copy_is_mapped_with_the_served_dtype():
    model = nn.Linear(4, 3, bias=False).to(torch.bfloat16)
    checkpoint = {"w": random(3, 4)}
    segment, mapped, _ = load(model, checkpoint, {"w": lambda t: model.weight.data.copy_(t)})
    assert mapped["w"].dtype == "bfloat16"
    assert torch.equal(view(segment, mapped["w"]), checkpoint["w"].bfloat16())


def test_axes_of_size_one_are_mapped():
    model = nn.ParameterList([nn.Parameter(torch.zeros(1, 5)), nn.Parameter(torch.zeros(1))])
    checkpoint = {"row": random(1, 5), "one": random(1)}
    segment, mapped, _ = load(
        model,
        checkpoint,
        {"row": lambda t: model[0].data.copy_(t), "one": lambda t: model[1].data.copy_(t)},
    )
    for name, tensor in checkpoint.items():
        assert torch.equal(view(segment, mapped[name]), tensor)


def test_what_has_no_single_plain_place_is_unmapped_with_a_reason():
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 4)) for _ in range(9)])
    checkpoint = {
        name: random(4, 4) + i
        for i, name in enumerate(
            ["split", "half", "reshaped", "twice", "computed", "unused", "broadcast", "sum", "plain"]
        )
    }
    checkpoint["reshaped"] = random(2, 8)
    checkpoint["broadcast"] = random(4)

    def split(t: torch.Tensor) -> None:
        model[0].data[:2].copy_(t[:2])
        model[0].data[2:].copy_(t[2:])

    def twice(t: torch.Tensor) -> None:
        model[3].data.copy_(t)
        model[4].data.copy_(t)

    segment, mapped, unmapped = load(
        model,
        checkpoint,
        {
            "split": split,
            "half": lambda t: model[1].data[:2].copy_(t[2:]),
            "reshaped": lambda t: model[2].data.copy_(t.view(4, 4)),
            "twice": twice,
            "computed": lambda t: model[5].data.copy_(-t.exp()),
            "unused": lambda _t: None,
            "broadcast": lambda t: model[6].data.copy_(t),
            "sum": lambda t: model[7].data.add_(t),
            "plain": lambda t: model[8].data.copy_(t),
        },
    )
    assert set(mapped) == {"plain"}
    for name in ("split", "half", "reshaped", "broadcast"):
        assert unmapped[name] == "vLLM splits or reshapes it while loading"
    assert unmapped["twice"] == "vLLM keeps it in 2 places"
    for name in ("computed", "unused", "sum"):
        assert unmapped[name] == "vLLM did not copy it as it is into a parameter"
    assert set(mapped) | set(unmapped) == set(checkpoint)
    assert torch.equal(view(segment, mapped["plain"]), checkpoint["plain"])


def test_copying_the_same_tensor_to_the_same_place_again_is_one_place():
    model = nn.Linear(4, 4, bias=False)

    def again(t: torch.Tensor) -> None:
        model.weight.data.copy_(t)
        model.weight.data.copy_(t)

    _, mapped, unmapped = load(model, {"w": random(4, 4)}, {"w": again})
    assert "w" in mapped
    assert not unmapped


def test_copies_to_elsewhere_do_not_count():
    model = nn.Linear(4, 4, bias=False)
    elsewhere = torch.zeros(4, 4)
    _, mapped, unmapped = load(model, {"w": random(4, 4)}, {"w": lambda t: elsewhere.copy_(t)})
    assert not mapped
    assert list(unmapped) == ["w"]


def test_memory_that_is_used_again_belongs_to_the_newest_tensor():
    """One read buffer for all tensors: each copy is put down to the tensor that is in it now."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 4)) for _ in range(3)])
    regions, nbytes = place.plan(model)
    segment = Segment.allocate(nbytes)
    place.move(model, regions, segment)
    buffer = torch.empty(4, 4)
    trace = CopyTrace(segment)
    with trace:
        for i, (_, tensor) in enumerate(trace.watch((f"t{i}", buffer.fill_(i + 1)) for i in range(3))):
            model[i].data.copy_(tensor)
    mapped, unmapped = trace.result()
    assert not unmapped
    assert [float(view(segment, mapped[f"t{i}"])[0, 0]) for i in range(3)] == [1, 2, 3]


# --- place ---------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Tied head, a buffer and a plain attribute over a parameter's storage, and things that stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("alias", self.inner.weight.data[1:3])
        self.inner.transposed = self.inner.weight.data.t()
        self.register_buffer("own", torch.arange(3.0))
        self.register_buffer("table", torch.arange(5))


def moved(model: nn.Module) -> tuple[Segment, dict[str, Region]]:
    regions, nbytes = place.plan(model)
    segment = Segment.allocate(nbytes)
    place.move(model, regions, segment)
    return segment, regions


def test_everything_over_a_parameters_storage_moves_together():
    model = Small()
    segment, regions = moved(model)
    assert set(regions) == {
        "embed.weight", "head.weight", "inner.weight", "inner.bias", "alias", "inner.transposed",
    }  # fmt: skip
    assert regions["embed.weight"] == regions["head.weight"]
    inside = range(segment.base, segment.base + segment.nbytes)
    for slot in place.slots(model):
        assert (slot.tensor.data_ptr() in inside) == (slot.name in regions), slot.name
    model.inner.weight.data.copy_(torch.arange(16.0).view(4, 4))
    assert model.alias.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(model.inner.transposed, model.inner.weight.t())
    model.embed.weight.data.fill_(3)
    assert bool((model.head.weight == 3).all())
    assert model.head.weight is model.embed.weight, "a tied parameter stays one parameter"
    assert model.own.tolist() == [0, 1, 2]


def test_storages_do_not_overlap_and_are_aligned():
    model = Small()
    segment, regions = moved(model)
    assert segment.nbytes % 4096 == 0
    distinct = sorted(
        {(regions[name].offset, regions[name].end) for name in ("embed.weight", "inner.weight", "inner.bias")}
    )
    assert all(start % 256 == 0 for start, _ in distinct)
    assert all(end <= start for (_, end), (start, _) in pairwise(distinct))


def test_a_second_model_of_the_same_kind_finds_its_values_in_the_arena():
    """What a restarted server does."""
    model = Small()
    segment, regions = moved(model)
    for parameter in model.parameters():
        parameter.data.copy_(random(*parameter.shape))
    again = Small()
    place.move(again, regions, segment)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.data_ptr() == other.data_ptr(), name


def test_moving_keeps_parameters_the_objects_that_they_are():
    model = Small()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    moved(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_another_model_is_refused_with_everything_that_differs_and_nothing_is_moved():
    segment, regions = moved(Small())
    other = Small()
    other.inner = nn.Linear(4, 5).to(torch.bfloat16)
    other.extra = nn.Linear(2, 2, bias=False)
    del other.alias
    places = {slot.name: slot.tensor.data_ptr() for slot in place.slots(other)}
    with pytest.raises(VerificationError) as caught:
        place.move(other, regions, segment)
    assert sorted(caught.value.problems) == [
        "alias is in the arena and not in the model",
        "extra.weight is in the model and not in the arena",
        "inner.bias is float32 (4,) in the arena, bfloat16 (5,) in the model",
        "inner.transposed is in the arena and not in the model",
        "inner.weight is float32 (4, 4) in the arena, bfloat16 (5, 4) in the model",
    ]
    assert {slot.name: slot.tensor.data_ptr() for slot in place.slots(other)} == places


def test_another_arrangement_of_the_same_shape_is_named():
    segment, regions = moved(nn.Linear(4, 4, bias=False))
    other = nn.Linear(4, 4, bias=False)
    other.weight.data = other.weight.data.t()
    with pytest.raises(VerificationError) as caught:
        place.move(other, regions, segment)
    assert caught.value.problems == ["weight has strides (4, 1) in the arena, (1, 4) in the model"]


def test_parameters_that_are_no_floats_or_have_no_memory_stay_where_they_are():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4))
    model.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    model.nothing = nn.Parameter(torch.empty(0))
    model.later = nn.Parameter(torch.empty(3, device="meta"))
    _, regions = moved(model)
    assert set(regions) == {"weight"}
    assert model.codes.tolist() == [0, 1, 2, 3]


def test_a_model_without_weights_makes_an_arena_that_can_be_mapped():
    segment, regions = moved(nn.ReLU())
    assert not regions
    assert segment.nbytes == 4096


def covered(extents: list[tuple[int, int]], region: Region) -> bool:
    return any(start <= region.offset and region.end <= end for start, end in extents)


def test_a_head_that_is_tied_again_after_loading_leaves_its_region_dead():
    """As vLLM does where the configuration ties what the checkpoint stores twice."""
    model = nn.Module()
    model.embed, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    segment, regions = moved(model)
    extents = place.live_extents(model, segment)
    assert all(covered(extents, region) for region in regions.values())
    model.head.weight = model.embed.weight
    extents = place.live_extents(model, segment)
    assert covered(extents, regions["embed.weight"])
    assert not covered(extents, regions["head.weight"])


def test_a_weight_that_is_repacked_after_loading_is_dead_and_its_neighbours_are_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    segment, regions = moved(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    model[1].bias.data = torch.empty(0)
    extents = place.live_extents(model, segment)
    assert {name for name, region in regions.items() if not covered(extents, region)} == {
        "0.weight",
        "1.bias",
    }
