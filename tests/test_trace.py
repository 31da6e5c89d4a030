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
    assert set(mapped) == {"plain", "split"}
    for name in ("reshaped", "broadcast"):
        assert unmapped[name] == "vLLM splits or reshapes it while loading"
    assert unmapped["half"] == "vLLM takes only a part of it"
    assert unmapped["twice"] == "vLLM keeps it in 2 places"
    for name in ("computed", "unused", "sum"):
        assert unmapped[name] == "vLLM did not copy it as it is into a parameter"
    assert set(mapped) | set(unmapped) == set(checkpoint)
    for name in mapped:
        assert torch.equal(view(segment, mapped[name]), checkpoint[name])


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


def test_pieces_that_make_up_one_strided_view_are_one_region():
    """As a fused projection is loaded that the checkpoint has fused too (Phi-3), and GPT-2's, transposed."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(10, 8)), nn.Parameter(torch.zeros(10, 8))])
    checkpoint = {"qkv": random(10, 8), "transposed": random(8, 10)}

    def fused(target: nn.Parameter, tensor: torch.Tensor) -> None:
        for start, length in ((0, 6), (6, 2), (8, 2)):
            target.data.narrow(0, start, length).copy_(tensor.narrow(0, start, length))

    segment, mapped, unmapped = load(
        model,
        checkpoint,
        {"qkv": lambda t: fused(model[0], t), "transposed": lambda t: fused(model[1], t.t())},
    )
    assert not unmapped
    for name, tensor in checkpoint.items():
        assert torch.equal(view(segment, mapped[name]), tensor)


def test_experts_that_the_checkpoint_stacks_are_one_region_with_a_place_for_each():
    """Granite's experts: gate and up of each, stacked in the checkpoint, loaded one by one."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, 8, 4))])
    checkpoint = {"w13": random(3, 8, 4)}

    def load_each(tensor: torch.Tensor) -> None:
        for expert in range(3):
            gate, up = tensor[expert].chunk(2, dim=0)
            model[0].data[expert].narrow(0, 0, 4).copy_(gate)
            model[0].data[expert].narrow(0, 4, 4).copy_(up)

    segment, mapped, unmapped = load(model, checkpoint, {"w13": load_each})
    assert not unmapped
    assert torch.equal(view(segment, mapped["w13"]), checkpoint["w13"])


def test_pieces_that_are_moved_about_are_no_region():
    """BLOOM's query, key and value: by head in the checkpoint, one after the other in vLLM."""
    model = nn.Linear(4, 12, bias=False)

    def by_head(tensor: torch.Tensor) -> None:
        for head in range(2):
            for which in range(3):
                source = tensor.narrow(0, head * 6 + which * 2, 2)
                model.weight.data.narrow(0, which * 4 + head * 2, 2).copy_(source)

    _, mapped, unmapped = load(model, {"qkv": random(12, 4)}, {"qkv": by_head})
    assert not mapped
    assert unmapped["qkv"] == "vLLM keeps it in 6 pieces that are no one strided view"


def test_a_copy_by_way_of_clones_and_joined_tensors_is_followed():
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, 6)) for _ in range(3)])
    checkpoint = {name: random(4, 6) + i for i, name in enumerate(["cloned", "cast", "permuted"])}
    checkpoint["joined"] = random(2, 6)
    model.append(nn.Parameter(torch.zeros(6, 2)))

    def joined(tensor: torch.Tensor) -> None:
        both = torch.cat([torch.zeros(1, 6), tensor], dim=0)
        model[3].data.copy_(both[1:].t())

    segment, mapped, unmapped = load(
        model,
        checkpoint,
        {
            "cloned": lambda t: model[0].data.copy_(t.clone()),
            "cast": lambda t: model[1].data.copy_(t.to(torch.float64)),
            "permuted": lambda t: model[2].data.copy_(t.t().contiguous().t()),
            "joined": joined,
        },
    )
    assert not unmapped
    for name, tensor in checkpoint.items():
        assert torch.equal(view(segment, mapped[name]), tensor)


def test_memory_that_is_used_again_for_something_computed_is_nobodys():
    """A clone is freed, and what is computed next lies where it lay."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(64, 64)) for _ in range(2)])

    def computed(tensor: torch.Tensor) -> None:
        clone = tensor.clone()
        model[0].data.copy_(clone)
        address = clone.data_ptr()
        del clone
        for _ in range(100):
            other = tensor.exp()
            if other.data_ptr() == address:
                break
        model[1].data.copy_(other)

    segment, mapped, unmapped = load(model, {"w": random(64, 64)}, {"w": computed})
    assert not unmapped
    assert mapped["w"].offset == model[0].data_ptr() - segment.base


@pytest.mark.parametrize("how", ["copied back", "in place", "by an out argument"])
def test_what_vllm_computes_with_after_loading_is_not_mapped(how):
    """As Mamba 2 loads its decay: copied as it is, then -exp of it in the same place (composed_weight_loader)."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))])

    def composed(tensor: torch.Tensor) -> None:
        data = model[0].data
        data.copy_(tensor)
        if how == "copied back":
            data.copy_(-torch.exp(data.float()))
        elif how == "in place":
            data.exp_()
        else:
            torch.neg(data, out=data)

    def onto_itself(tensor: torch.Tensor) -> None:
        model[1].data.copy_(tensor)
        model[1].data.copy_(model[1].data)

    _, mapped, unmapped = load(
        model, {"A_log": random(4), "other": random(4)}, {"A_log": composed, "other": onto_itself}
    )
    assert set(mapped) == {"other"}
    assert "vLLM computes with it after loading" in unmapped["A_log"]


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
