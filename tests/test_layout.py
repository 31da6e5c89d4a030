"""Layouts over the wire: what a server says is checked before a byte of its memory is looked at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hogwild.errors import CheckpointError, ProtocolError
from hogwild.layout import Layout, Region, Source, weight_files

SOURCE = Source("/models/a", (("model.safetensors", 10, 20, 30),), "digest")
LAYOUT = Layout(
    4096,
    {"a": Region(0, (4, 8), (8, 1), "float32"), "b.weight": Region(128, (3, 2), (1, 3), "bfloat16")},
    {"rotary": "vLLM did not copy it"},
    {"model.a": Region(0, (8, 8), (8, 1), "float32"), "scalar": Region(4092, (), (), "float32")},
    SOURCE,
    {"torch": "2"},
)


def over_the_wire(layout: Layout) -> Any:
    return json.loads(json.dumps(layout.to_json()))


def test_a_layout_survives_the_wire():
    received = Layout.from_json(over_the_wire(LAYOUT))
    assert received == LAYOUT
    assert received.fingerprint() == LAYOUT.fingerprint()
    assert len(LAYOUT.fingerprint()) == 32


def test_any_change_changes_the_fingerprint():
    moved = replace(LAYOUT, tensors={**LAYOUT.tensors, "a": Region(4, (4, 8), (8, 1), "float32")})
    others = [
        moved,
        replace(LAYOUT, nbytes=8192),
        replace(LAYOUT, frozen={}),
        replace(LAYOUT, parameters={}),
        replace(LAYOUT, source=replace(SOURCE, config="other")),
        replace(LAYOUT, versions={"torch": "3"}),
    ]
    assert len({layout.fingerprint() for layout in [LAYOUT, *others]}) == 7


def region(**changes: Any) -> dict[str, Any]:
    return {"offset": 0, "shape": [4, 8], "stride": [8, 1], "dtype": "float32", **changes}


def with_tensor(item: Any) -> dict[str, Any]:
    return {**over_the_wire(LAYOUT), "tensors": {"a": item}}


@pytest.mark.parametrize(
    "item",
    [
        region(offset=-4),
        region(offset=4096),
        region(offset=4096 - 124),
        region(offset=2),
        region(offset=2**70),
        region(offset=1e999),
        region(offset=float("nan")),
        region(offset=0.5),
        region(offset="0"),
        region(offset=True),
        region(offset=None),
        region(shape=[4, 257]),
        region(shape=[-4, 8]),
        region(shape=[4]),
        region(shape="48"),
        region(shape=[2**40, 2**40]),
        region(shape=4),
        region(shape=[[4], [8]]),
        region(stride=[8, -1]),
        region(stride=[10**30, 1]),
        region(stride=["8", "1"]),
        region(shape=[2**62], stride=[0]),
        region(shape=[4, 2**64], stride=[0, 0]),
        region(shape=[0, 2**64], stride=[1, 1]),
        region(dtype="int64"),
        region(dtype="torch.float32"),
        region(dtype=None),
        region(dtype={}),
        {},
        None,
        [],
        "region",
        {k: v for k, v in region().items() if k != "stride"},
    ],
    ids=str,
)
@pytest.mark.parametrize("table", ["tensors", "parameters"])
def test_a_region_that_is_none_or_leaves_the_arena_is_refused(table, item):
    assert Layout.from_json({**over_the_wire(LAYOUT), table: {"a": region()}})
    with pytest.raises(ProtocolError):
        Layout.from_json({**over_the_wire(LAYOUT), table: {"a": item}})


@pytest.mark.parametrize("nbytes", [0, -1, -4096, 1e999, "4096", None, True, 4096.5, [4096]])
def test_a_size_that_is_none_is_refused(nbytes):
    with pytest.raises(ProtocolError):
        Layout.from_json({**over_the_wire(LAYOUT), "nbytes": nbytes, "tensors": {}, "parameters": {}})


@pytest.mark.parametrize("key", ["nbytes", "tensors", "frozen", "parameters", "source", "versions"])
@pytest.mark.parametrize("value", [None, 3, "x", [1], {"x": None}])
def test_a_field_of_the_wrong_type_is_refused(key, value):
    if key in ("frozen", "versions") and isinstance(value, dict):
        pytest.skip("any value becomes text there")
    with pytest.raises(ProtocolError):
        Layout.from_json({**over_the_wire(LAYOUT), key: value})


@pytest.mark.parametrize("key", ["nbytes", "tensors", "frozen", "parameters", "source", "versions"])
def test_a_missing_field_is_refused(key):
    with pytest.raises(ProtocolError):
        Layout.from_json({k: v for k, v in over_the_wire(LAYOUT).items() if k != key})


NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.integers(-8, 8) | st.sampled_from([64, 128, 4096])
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
), max_leaves=8)  # fmt: skip
REGIONS = st.fixed_dictionaries(
    {
        "offset": NUMBERS | JSON,
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "stride": st.lists(NUMBERS, max_size=3) | JSON,
        "dtype": st.sampled_from(["float32", "bfloat16", "int8"]) | JSON,
    }
)


@given(JSON | REGIONS)
def test_whatever_a_region_is_it_is_refused_or_lies_inside(item):
    try:
        layout = Layout.from_json(with_tensor(item))
    except ProtocolError:
        return
    found = layout.tensors["a"]
    assert 0 <= found.offset <= found.end <= layout.nbytes
    elements = 1
    for size in found.shape:
        elements *= size
    assert elements * found.torch_dtype.itemsize <= layout.nbytes


@given(JSON)
def test_whatever_is_sent_instead_of_a_layout_is_refused(data):
    with pytest.raises(ProtocolError):
        Layout.from_json(data)
    with pytest.raises(ProtocolError):
        Layout.from_json({**over_the_wire(LAYOUT), "source": data})


def test_a_source_is_known_by_its_files_not_by_its_path(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"123")
    source = Source.of(folder, [str(folder / "model.safetensors")])
    folder.rename(tmp_path / "renamed")
    (tmp_path / "link").symlink_to(tmp_path / "renamed")
    assert source.same_files(Source.of(tmp_path / "link", ["model.safetensors"]))
    (tmp_path / "renamed" / "config.json").write_text("{ }")
    assert not source.same_files(Source.of(tmp_path / "renamed", ["model.safetensors"]))
    (tmp_path / "renamed" / "config.json").write_text("{}")
    (tmp_path / "renamed" / "model.safetensors").write_bytes(b"1234")
    assert not source.same_files(Source.of(tmp_path / "renamed", ["model.safetensors"]))


def test_weight_files_are_those_of_the_index(tmp_path: Path):
    for name in ("b.safetensors", "a.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == ["a.safetensors", "b.safetensors", "consolidated.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}')
    assert weight_files(tmp_path) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": "c"}}'])
def test_a_damaged_index_is_named(tmp_path: Path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=str(index)):
        weight_files(tmp_path)
