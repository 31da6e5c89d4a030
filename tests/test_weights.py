"""Verification of the arena against a checkpoint, and writing a checkpoint into it in place."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hogwild.arena.client import Arena
from hogwild.errors import CheckpointError, VerificationError
from hogwild.weights import Weights, digest, load_arena, read_tensors, verify_bits
from tiny import llama

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama(tmp_path / "model", torch.bfloat16)


@pytest.fixture
def weights(folder: Path) -> Weights:
    return Weights(load_arena(folder))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of the checkpoint; None removes one."""
    file = folder / "model.safetensors"
    held = load_file(file)
    for name, tensor in tensors.items():
        held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
    save_file(held, file, {"format": "pt"})


def problems(weights: Weights, folder: Path) -> list[str]:
    with pytest.raises(VerificationError) as caught:
        verify_bits(weights, folder)
    assert str(folder) in str(caught.value)
    return sorted(caught.value.problems)


def test_an_arena_equals_the_checkpoint_it_was_loaded_from(weights, folder):
    verify_bits(weights, folder)
    stored = dict(read_tensors(folder))
    assert set(stored) == set(weights.names)
    for name, tensor in stored.items():
        assert torch.equal(weights.view(name), tensor)
        assert weights.view(name).data_ptr() % 64 == 0
    assert weights.nbytes == sum(tensor.nbytes for tensor in stored.values())


def test_what_is_no_weight_by_its_type_has_no_place_in_an_arena(weights, folder):
    change(folder, **{"model.position_ids": torch.arange(5), "model.causal": torch.ones(4).bool()})
    found = Weights(load_arena(folder))
    assert found.names == weights.names
    assert found.arena.layout.frozen == {"model.position_ids": "of int64", "model.causal": "of bool"}
    verify_bits(found, folder)


def test_numbers_that_no_checkpoint_of_ours_can_hold_are_named(folder):
    few = torch.ones(4, 4).to(torch.float8_e4m3fn)
    change(folder, **{UP: few, DOWN: few.clone(), "model.position_ids": torch.arange(5)})
    with pytest.raises(CheckpointError) as caught:
        load_arena(folder)
    assert str(caught.value).splitlines()[1:] == [f"  - {name}: float8_e4m3fn" for name in (UP, DOWN)]


def test_every_mismatch_is_named_at_once(weights, folder):
    held = load_file(folder / "model.safetensors")
    flipped = held[UP].clone()
    flipped.view(torch.int16)[3, 5] ^= 1
    change(
        folder,
        **{
            UP: flipped,
            NORM: None,
            QUERY: held[QUERY][:16].clone(),
            DOWN: held[DOWN] + 1,
            "more.weight": held[NORM],
        },
    )
    different = int((held[DOWN] + 1 != held[DOWN]).sum())
    assert problems(weights, folder) == [
        f"{UP}: 1 of {held[UP].numel()} elements differ in their bits",
        f"{QUERY}: (16, 32) in the checkpoint, (32, 32) served",
        f"{DOWN}: {different} of {held[DOWN].numel()} elements differ in their bits",
        f"{NORM}: served, not in the checkpoint",
        "more.weight: in the checkpoint, not among the served weights",
    ]


def test_bits_are_compared_not_numbers(weights, folder):
    """NaN equals itself here, and zero does not equal minus zero."""
    nan = torch.full((32,), float("nan"), dtype=torch.bfloat16)
    weights.view(NORM).copy_(nan)
    change(folder, **{NORM: nan})
    verify_bits(weights, folder)
    weights.view(NORM).view(torch.int16)[4] ^= 1  # another NaN
    assert problems(weights, folder) == [f"{NORM}: 1 of 32 elements differ in their bits"]
    weights.view(NORM).zero_()
    change(folder, **{NORM: -torch.zeros(32, dtype=torch.bfloat16)})
    assert problems(weights, folder) == [f"{NORM}: 32 of 32 elements differ in their bits"]


def test_strided_and_cast_views_are_compared_too(folder):
    """A transposed view of bf16 against a checkpoint in fp32."""
    held = load_file(folder / "model.safetensors")
    arena = load_arena(folder)
    region = arena.layout.tensors[UP]
    arena.weights.tensor(region.offset, (32, 48), (48, 1), torch.bfloat16).copy_(held[UP].t())
    turned = replace(region, stride=(1, 48))
    layout = replace(arena.layout, tensors={**arena.layout.tensors, UP: turned})
    weights = Weights(Arena(arena.weights, arena.control, layout))
    verify_bits(weights, folder)
    change(folder, **{UP: held[UP].float()})
    verify_bits(weights, folder)
    weights.view(UP)[0, 1] += 1
    assert problems(weights, folder) == [f"{UP}: 1 of {held[UP].numel()} elements differ in their bits"]


def test_frozen_tensors_are_not_compared_but_must_be_there(folder):
    arena = load_arena(folder)
    tensors = {name: region for name, region in arena.layout.tensors.items() if name != UP}
    layout = replace(arena.layout, tensors=tensors, frozen={UP: "packed", "gone.weight": "split"})
    weights = Weights(Arena(arena.weights, arena.control, layout))
    assert problems(weights, folder) == ["gone.weight: served, not in the checkpoint"]


def test_writing_a_checkpoint_keeps_every_address(weights, tmp_path):
    addresses = {name: weights.view(name).data_ptr() for name in weights.names}
    held = {name: weights.view(name) for name in weights.names}
    other = llama(tmp_path / "other", torch.bfloat16, seed=1)
    weights.write(other)
    verify_bits(weights, other)
    assert {name: weights.view(name).data_ptr() for name in weights.names} == addresses
    for name, tensor in read_tensors(other):
        assert torch.equal(held[name], tensor), "views made before see the new values"


@pytest.mark.parametrize("flaw", ["missing", "mis-shaped", "broadcastable", "truncated", "absent shard"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    weights, folder, tmp_path, flaw
):
    """The server reads this memory: half of one model and half of another must never be in it."""
    other = llama(tmp_path / "other", torch.bfloat16, seed=1)
    file = other / "model.safetensors"
    names = [UP]
    if flaw == "missing":
        change(other, **{UP: None, DOWN: None})
        names = [UP, DOWN]
    elif flaw == "mis-shaped":
        change(other, **{UP: torch.zeros(5, 5), DOWN: torch.zeros(3, dtype=torch.bfloat16)})
        names = [UP, DOWN]
    elif flaw == "broadcastable":
        change(other, **{UP: torch.zeros(1, 32, dtype=torch.bfloat16)})
    elif flaw == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
        names = [str(file)]
    else:
        (other / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.safetensors", "b": "zzz.safetensors"}}'
        )
        names = ["zzz.safetensors"]
    with pytest.raises(CheckpointError) as caught:
        weights.write(other)
    for name in names:
        assert name in str(caught.value)
    verify_bits(weights, folder)


@pytest.mark.parametrize("flaw", ["absent", "empty", "nonsense", "truncated", "no permission"])
def test_a_checkpoint_that_cannot_be_read_names_its_file(folder, flaw):
    file = folder / "model.safetensors"
    expected = str(file)
    if flaw == "absent":
        expected = str(folder / "elsewhere")
        folder = folder / "elsewhere"
    elif flaw == "empty":
        file.unlink()
        expected = str(folder)
    elif flaw == "nonsense":
        file.write_bytes(b"this is no safetensors file")
    elif flaw == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
        file.mkdir()
    for read in (digest, load_arena, lambda f: list(read_tensors(f))):
        with pytest.raises(CheckpointError, match=expected):
            read(folder)


def test_the_digest_knows_a_model_by_its_names_shapes_types_and_bits(folder, tmp_path):
    known = digest(folder)
    assert digest(llama(tmp_path / "same", torch.bfloat16)) == known
    held = load_file(folder / "model.safetensors")
    seen = {known}
    for changed in (held[NORM] + 1, held[NORM].reshape(4, 8), held[NORM].view(torch.float16)):
        change(folder, **{NORM: changed})
        seen.add(digest(folder))
    change(folder, **{NORM: None, "renamed": held[NORM]})
    seen.add(digest(folder))
    assert len(seen) == 5
    change(folder, renamed=None, **{NORM: held[NORM]})
    assert digest(folder) == known


def test_tensors_without_axes_or_elements(tmp_path):
    """A scalar (some models store a scale) and an empty tensor are tensors too."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"scale": torch.tensor(2.5), "nothing": torch.empty(0, 3), "w": torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors")
    arena = load_arena(folder)
    verify_bits(Weights(arena), folder)
    assert float(Weights(arena).view("scale")) == 2.5
    one = digest(folder)
    save_file({**tensors, "scale": torch.tensor(3.5)}, folder / "model.safetensors")
    assert digest(folder) != one
    assert problems(Weights(arena), folder) == ["scale: 1 of 1 elements differ in their bits"]


def test_a_layout_of_such_an_arena_crosses_the_wire(folder):
    arena = load_arena(folder)
    received = type(arena.layout).from_json(arena.layout.to_json())
    assert received.fingerprint() == arena.control.fingerprint


def test_a_header_that_promises_too_much_is_refused(folder):
    """A hostile header must not make the reader allocate or crash."""
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError):
        digest(folder)
