"""Any model that vLLM serves: what is served is what is trained, in every family, weight by weight.

The short selection of the matrix; `make matrix` runs all of it. One vLLM process serves all models one after another.
Numbers in names and comments are those of the special cases in docs/models.md.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import matrix
import special_cases
from architectures import ARCHITECTURES, Architecture
from hogwild import rope, skeleton
from hogwild.weights import Weights, verify_bits

SHORT = [architecture for architecture in ARCHITECTURES if architecture.short]
EACH = {"Qwen3.5 dense text", "Qwen3-MoE"}  # every weight alone too, which takes a while

pytestmark = pytest.mark.vllm


def named(name: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[matrix.ServerProcess]:
    process = matrix.ServerProcess(tmp_path_factory.mktemp("matrix"))
    yield process
    process.end()


@pytest.mark.parametrize("architecture", SHORT, ids=lambda one: one.name)
def test_what_is_served_is_what_is_trained(server, tmp_path, architecture):
    outcome = matrix.examine(server, architecture, tmp_path / "model", each=architecture.name in EACH)
    assert outcome.problems(architecture) == []
    assert outcome.refused or outcome.bound > 10


def test_the_matrix_is_as_large_as_it_is_said_to_be():
    assert len(ARCHITECTURES) >= 28
    assert len({architecture.name for architecture in ARCHITECTURES}) == len(ARCHITECTURES)
    assert {architecture.row for architecture in SHORT} == {
        architecture.row for architecture in ARCHITECTURES
    }


def test_every_special_case_has_a_removal_that_still_applies():
    """special_cases.py takes the handling of each out and sees a test fail: minutes each, so not here."""
    table = (special_cases.REPOSITORY / "docs" / "models.md").read_text().partition("## Special cases")[2]
    removals = special_cases.REMOVALS
    assert {str(r.case) for r in removals} == set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE))
    for removal in removals:
        assert (special_cases.REPOSITORY / removal.file).read_text().count(removal.old) == 1, removal.what
        file, _, test = removal.test.partition("::")
        if test:
            assert f"def {test}(" in (special_cases.REPOSITORY / file).read_text()
        else:
            assert any(file.removeprefix("matrix: ") in architecture.name for architecture in ARCHITECTURES)


def test_a_convolution_stays_plain_on_a_cpu_that_would_pack_it(server, tmp_path):
    """(2) With AVX512-BF16, vLLM packs the convolution of Gated DeltaNet, and its kernel takes any weight for a
    packed one."""
    architecture = replace(named("Qwen3.5 dense text"), vllm={"pretend_avx512_bf16": True})
    outcome = matrix.examine(server, architecture, tmp_path / "model", each=False)
    assert outcome.problems(architecture) == []


def test_what_vllm_keeps_as_other_numbers_is_frozen_though_its_copy_looked_plain(server, tmp_path):
    """(4) Mamba's decay in an fp32 checkpoint: copied without a cast, then overwritten by -exp of it."""
    folder = named("Mamba 2").build(tmp_path / "model", torch.float32)
    arena = server.load(folder)
    assert {name.rpartition(".")[2] for name in arena.layout.frozen} == {"A_log"}
    assert all("vLLM computes with it" in why for why in arena.layout.frozen.values())
    verify_bits(Weights(arena), folder)


def test_a_cast_to_fp32_is_trained_as_fp32(server, tmp_path):
    """(7) Gated DeltaNet's decay: bf16 in the checkpoint, fp32 in vLLM, and so in the trainer."""
    folder = named("Qwen3.5 dense text").build(tmp_path / "model")
    weights = Weights(server.load(folder))
    decays = {n: r for n, r in skeleton.bound(skeleton.build(folder, weights)).items() if n.endswith("A_log")}
    assert len(decays) == 2
    assert {region.dtype for region in decays.values()} == {"float32"}
    assert {region.dtype for name, region in weights.arena.layout.tensors.items() if "A_log" not in name} == {
        "bfloat16"
    }


@pytest.mark.parametrize(
    "name",
    [
        "Llama, longrope, long factors",
        "Llama, longrope, short factors",
        "Llama, dynamic",
        "Phi-MoE, longrope",
    ],
)
def test_rotary_frequencies_are_the_servers_in_short_texts_and_in_long_ones(server, tmp_path, name):
    """(18) In fp32, where nothing hides another frequency."""
    architecture = named(name)
    assert matrix.in_fp32(server, architecture, tmp_path / "model") <= matrix.EXACT
    longest = architecture.vllm.get("max_model_len", 128)
    arena = server.load(tmp_path / "model", dtype="float32", **architecture.vllm)
    assert arena.max_model_len == longest
    model = skeleton.build(tmp_path / "model", Weights(arena))
    original = model.config.rope_parameters.get("original_max_position_embeddings")
    if original is not None:
        assert min(map(len, matrix.PROMPTS)) < original
        rope.fix(model, original if longest > original else original + 1)
        with torch.no_grad():
            assert max(matrix.compare(model, server.ask()).means) > 10 * matrix.EXACT, "nothing is proved"


def test_compiled_serving_sees_what_is_written_in_place(server, tmp_path):
    """(12) torch.compile, with linear layers and experts that it sees as operators."""
    architecture = replace(named("Qwen3-MoE"), vllm={"enforce_eager": False})
    outcome = matrix.examine(server, architecture, tmp_path / "model", each=False)
    assert outcome.problems(architecture) == []


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"tensor_parallel_size": 2}, "this server cannot be trained.*use one"),
        ({"quantization": "fp8"}, "this server cannot be trained.*without --quantization"),
        ({"data_parallel_size": 2}, "this server cannot be trained.*without --data-parallel-size"),
        ({"runner": "pooling"}, "this server cannot be trained.*without --runner pooling"),
        ({"hf_overrides": {"rms_norm_eps": 0.5}}, "this server cannot be trained.*rms_norm_eps.*config.json"),
        ({"logprobs_mode": "raw_logits"}, "this server cannot be trained.*raw_logits"),
        ({"weight_transfer_config": {}}, "this server cannot be trained.*--weight-transfer-config"),
        (
            {"enable_prefix_caching": True},
            "this server cannot be trained.*older weights.*with `hogwild vllm`",
        ),
        ({"enable_sleep_mode": True}, "Sleep mode is not supported"),  # by vLLM itself, on a CPU
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_a_server_that_cannot_be_trained_is_told_what_would_work(server, tmp_path, settings, advice):
    """(11) among them: several ranks hold slices, which no single process sees."""
    folder = named("Llama").build(tmp_path / "model")
    server.say({"check": str(folder), "settings": {}})
    with pytest.raises(matrix.RefusedError, match=f"(?s){advice}"):
        server.say({"check": str(folder), "settings": settings})


def test_a_model_that_is_described_elsewhere_is_refused(server, tmp_path):
    folder, other = named("Llama").build(tmp_path / "model"), named("Llama").build(tmp_path / "other")
    server.say({"check": str(folder), "settings": {"hf_config_path": str(folder)}})
    with pytest.raises(matrix.RefusedError, match="--hf-config-path"):
        server.say({"check": str(folder), "settings": {"hf_config_path": str(other)}})


def test_vllm_puts_no_other_weights_in_the_place_of_those_that_are_trained(server, tmp_path):
    folder = named("Llama").build(tmp_path / "model")
    weights = Weights(server.load(folder))
    name = weights.names[0]
    learned = weights.view(name).mul_(1.5).clone()
    with pytest.raises(matrix.RefusedError, match="hogwild rollback"):
        server.say({"reload": {}})
    assert torch.equal(weights.view(name), learned)


def test_linear_layers_stay_plain_whatever_this_cpu_would_pack(server, tmp_path):
    """(1) oneDNN packs fp32 on every x86 CPU, bf16 only on some."""
    folder = named("Llama").build(tmp_path / "model", torch.float32)
    weights = Weights(server.load(folder, dtype="float32"))
    assert weights.arena.layout.frozen == {}
    verify_bits(weights, folder)
    model = skeleton.build(folder, weights)
    before = server.ask()
    for name in skeleton.bound(model):
        if name.endswith("down_proj.weight"):
            model.get_parameter(name).data.mul_(1.5)
    assert not server.ask().same(before)
