"""What training of a model takes of a GPU, reckoned beforehand, against what it takes where that can be seen."""

import gc
import math
import tomllib
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from families import OMIT, build
from hogwild import doctor_model, gpu_memory, loss, skeleton
from hogwild.apollo import Optimizer
from hogwild.backward import Gather
from hogwild.coverage import examine
from hogwild.encoding import Encoded
from hogwild.gpu_memory import Model, predict
from hogwild.settings import Config
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from hogwild_kernels import UpdateResult
from test_context import prepared
from test_trainer import EXAMPLE
from tiny import llama, qwen2

REPOSITORY = Path(__file__).parents[1]

# Llama 3.1 8B, with its embeddings frozen
LLAMA = Model(
    {
        **{
            f"{i}.{name}": shape
            for i in range(32)
            for name, shape in {
                "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
                "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336), "norm1": (4096,), "norm2": (4096,),
            }.items()
        },
        "head": (128256, 4096),
    },
    copied=0, vocabulary=128256, hidden=4096, layers=32, state=32 * 2 * 8 * 128, repeats=4,
)  # fmt: skip


def shaped(hidden: int, inner: int, layers: int, q: int, kv: int, vocabulary: int) -> Model:
    """A model of these sizes, with a head of its own and its embeddings frozen."""
    trained: dict[str, tuple[int, ...]] = {"head": (vocabulary, hidden)}
    for i in range(layers):
        trained |= {f"{i}.{name}": (size, hidden) for name, size in {"q": q, "k": kv, "v": kv}.items()}
        trained |= {f"{i}.o": (hidden, q), f"{i}.gate": (inner, hidden), f"{i}.up": (inner, hidden)}
        trained |= {f"{i}.down": (hidden, inner), f"{i}.norm1": (hidden,), f"{i}.norm2": (hidden,)}
    return Model(
        trained,
        copied=0,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        state=layers * 2 * kv,
        repeats=q // kv,
    )


def config(**tables: Any) -> Config:
    return Config.model_validate(tables)


def test_the_moments_are_those_that_the_optimizer_keeps(tmp_path):
    folder = qwen2(tmp_path / "model", tie_word_embeddings=False)
    settings = config(optimizer={"rank": 4})
    weights = Weights(load_arena(folder))
    optimizer = Optimizer(settings.optimizer, 0)
    trainer = Trainer(
        skeleton.build(folder, weights), optimizer, Progress(weights.arena.control, 8), set(weights.names), "full", 0
    )  # fmt: skip
    trainer.step([Item(EXAMPLE)])
    moments = sum(
        tensor.nbytes for name, tensor in optimizer.tensors().items() if name.rpartition("/")[2].startswith("exp")
    )  # fmt: skip
    sizes = examine(folder, weights.arena.layout).sizes
    assert predict(sizes, settings).moments == moments > 0
    assert (sizes.vocabulary, sizes.hidden, sizes.layers, sizes.itemsize) == (64, 32, 2, 4)
    assert sizes.copied == 0


def test_what_has_no_place_in_the_arena_is_copied_for_each_model(tmp_path):
    folder = qwen2(tmp_path / "model")
    layout = load_arena(folder).layout
    name = "model.layers.0.mlp.down_proj.weight"
    packed = replace(
        layout, tensors={k: v for k, v in layout.tensors.items() if k != name}, frozen={name: "packed"}
    )
    sizes = examine(folder, packed).sizes
    assert sizes.copied == 4 * 32 * 48
    assert name not in sizes.trained
    assert predict(sizes, config(training={"threads": 3})).copies == 4 * sizes.copied


def test_an_8b_model_with_its_defaults():
    """By hand: rank 64 on 7 matrices a layer and the head, directions of 256, two threads of 2 GiB activations, and in
    each an example of 2048 trained tokens."""
    needs = predict(LLAMA, Config())
    wide = 2 * 4096 + 2 * 4096 + 3 * 14336  # max(m, n) of q, k, v, o, and of gate, up, down
    both = 2 * (4096 + 4096) + 2 * (1024 + 4096) + 3 * (14336 + 4096)
    assert needs.moments == 8 * (64 * (32 * wide + 128256) + 64 * 4096)
    assert needs.directions == 2 * 256 * (32 * (6 * 4096 + 14336) + 4096)
    keys = 2048 * 2 * 8 * 128 * (1 + 4)  # of a context, joined, and written out for 32 heads
    layer = 2 * (2 * 2048 * both + keys)
    assert needs.activations == 2 * ((2 << 30) + layer)
    mask = 2 * 2 * 2048 * 4096 + (20 << 20)
    assert needs.contexts == 2 * (2 * 2048 * (128 << 10) + mask)  # 128 KiB a token, twice, in both threads
    assert needs.logits == 2 * (2048 * 128256 * 2 * 2 + 12 * loss.PIECE - layer)
    assert needs.copies == 0
    assert needs.total == sum(vars(needs).values())
    assert str(needs).startswith(f"{needs.total / 2**30:.1f} GiB (")


@pytest.mark.parametrize(
    ("tables", "grows"),
    [
        ({"training": {"threads": 3}}, {"activations", "contexts", "logits", "update"}),
        ({"training": {"batch_tokens": 1024}}, {"activations", "contexts"}),
        ({"training": {"max_tokens": 4096}}, {"activations", "contexts", "logits", "update"}),
        ({"training": {"max_tokens": 8192, "max_trained_tokens": 1984}}, {"activations", "contexts"}),
        ({"training": {"activation_mib": 4096}}, {"activations", "update"}),
        ({"training": {"activation_mib": 64}}, set()),
        (
            {"training": {"activation_mib": 0, "batch_tokens": 20_000}},
            {"activations", "contexts", "logits", "update"},
        ),
        ({"optimizer": {"rank": 128}}, {"moments", "update"}),
        ({"replay": {"protected_rank": 512}}, {"directions"}),
        ({"replay": {"protected_rank": 0}}, set()),
    ],
)
def test_what_each_setting_adds_to(tables, grows):
    before, after = predict(LLAMA, Config()), predict(LLAMA, config(**tables))
    grown = {name for name in vars(before) if getattr(after, name) > getattr(before, name)}
    assert grown == grows


def peak(work: Callable[[], object]) -> int:
    """Bytes allocated on the CPU at most beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(
        (one for one in results.events() if one.name() == "[memory]"), key=lambda one: one.start_ns()
    )
    return max(accumulate(one.nbytes() for one in events))


def test_gradients_that_were_scaled_are_copied_once():
    gather, x, d = Gather(), torch.zeros(64, 256).half(), torch.ones(64, 50_000).half()
    gather.scale = 4.0
    assert peak(lambda: gather.unscaled(x, d)) < 4.1 * (x.numel() + d.numel())
    assert torch.equal(gather.unscaled(x, d)[1], torch.full(d.shape, 0.25))
    assert bool((d == 1).all())


def of(examples: list[tuple[int, int]]) -> list[Item]:
    """Each of so many trained tokens after so many of context."""
    return [
        Item(Encoded([5 + i] * (context + trained), [False] * context + [True] * trained))
        for i, (trained, context) in enumerate(examples)
    ]


LONG, WAITING, READ = [(900, 0)], [(400, 0)] * 4, [(60, 840)] * 6


@pytest.mark.parametrize(
    ("mib", "examples", "least"),
    [
        (0, LONG, 0.3), (64, LONG, 0.2), (4, [*LONG, *LONG], 0.3), (4, WAITING, 0.2), (64, WAITING, 0.3),
        (4, READ, 0.2),
    ],
    ids=["a long text", "with room", "two of them", "rows that wait", "with room for them", "contexts"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_takes_more_than_was_reckoned(tmp_path, dtype, mib, examples, least):
    """All but the update, which is another one on a CPU; but not far less, either, than a bound would say that is not
    one of this model."""
    folder = llama(
        tmp_path / "model", dtype, vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    trainer, optimizer = prepared(folder, activation_mib=mib)
    trainer._activations = mib << 20
    optimizer._note = lambda *_: UpdateResult(0.0, skipped=False)
    items = of(examples)
    trainer.step(items)  # measures how large activations are
    taken = peak(lambda: trainer.step(items))
    sizes = examine(folder, load_arena(folder).layout).sizes
    chosen = {"max_trained_tokens": 60} if examples is READ else {}
    needs = predict(
        sizes, config(training={"threads": 1, "max_tokens": 900, "activation_mib": mib, **chosen})
    )
    reckoned = needs.activations + needs.contexts * (examples is READ) + needs.logits
    assert least * reckoned < taken < reckoned


_FEW = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip


def mamba(width: int, state: int, chunk: int) -> tuple[str, dict[str, Any]]:
    sizes = {
        "mamba_d_ssm": 8 * width,
        "mamba_d_head": width,
        "mamba_d_state": state,
        "mamba_chunk_size": chunk,
    }
    return "falcon_h1", {**_FEW, "mamba_n_heads": 8, **sizes}


def delta_net(heads: int, keys: int, values: int) -> tuple[str, dict[str, Any]]:
    sizes = {"linear_key_head_dim": keys, "linear_value_head_dim": values, "head_dim": 32}
    number = {"linear_num_key_heads": heads, "linear_num_value_heads": heads}
    return "qwen3_5_text", {**_FEW, **sizes, **number, "layer_types": ["linear_attention", "full_attention"]}


MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 32, "chunk_size": 64, "intermediate_size": OMIT}


@pytest.mark.parametrize("mib", [0, 8])
@pytest.mark.parametrize(
    ("family", "settings", "tokens"),
    [
        (*mamba(32, 32, 64), 900), (*mamba(32, 32, 256), 900), (*mamba(32, 128, 64), 900), (*mamba(64, 16, 16), 900),
        (*mamba(64, 128, 32), 900), (*delta_net(4, 32, 32), 900), (*delta_net(4, 128, 128), 900),
        (*delta_net(8, 16, 64), 900), ("mamba2", {**_FEW, **MAMBA2}, 900),
        ("mamba", {**_FEW, "state_size": 64, "intermediate_size": OMIT}, 100),  # token by token
        ("jamba", {**_FEW, "mamba_d_state": 16, "mamba_dt_rank": 8}, 100),
    ],
)  # fmt: skip
def test_the_scans_of_recurrent_layers_are_reckoned(tmp_path, family, settings, tokens, mib):
    """With few weights, nearly all of it."""
    folder = build(family, tmp_path / "model", torch.bfloat16, **settings)
    trainer, optimizer = prepared(folder, activation_mib=mib)
    trainer._activations, optimizer._note = mib << 20, lambda *_: UpdateResult(0.0, skipped=False)
    items = of([(tokens, 0)])
    trainer.step(items)
    taken = peak(lambda: trainer.step(items))
    sizes = examine(folder, load_arena(folder).layout).sizes
    chosen = {"threads": 1, "max_tokens": tokens, "batch_tokens": min(tokens, 512), "activation_mib": mib}
    needs = predict(sizes, config(training=chosen))
    reckoned = needs.activations + needs.logits
    assert 0.2 * reckoned < taken < reckoned
    assert mib or 0.4 * reckoned < taken


def sharing(folder: Path, heads: tuple[int, int]) -> Path:
    """So many query heads, and heads of keys and values, in many layers. Few and wide ones take as much memory as many
    narrow ones, and less time."""
    return llama(
        folder, torch.bfloat16, vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=24,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=1024,
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize("examples", [[(2, 890)] * 6, [(40, 860)] * 6], ids=["2 tokens", "40 tokens"])
@pytest.mark.parametrize("mib", [0, 2, 24])
@pytest.mark.parametrize("heads", [(8, 2), (2, 2)])
def test_few_tokens_after_long_contexts_take_no_more_than_was_reckoned(tmp_path, heads, mib, examples):
    folder = sharing(tmp_path / "model", heads)
    trainer, optimizer = prepared(folder, activation_mib=mib)
    trainer._activations = mib << 20
    optimizer._note = lambda *_: UpdateResult(0.0, skipped=False)
    items = of(examples)
    trainer.step(items if mib else items[:1])  # measures how large activations are, where any are kept
    taken = peak(lambda: trainer.step(items))
    sizes = examine(folder, load_arena(folder).layout).sizes
    assert sizes.repeats == heads[0] // heads[1]
    chosen = {"threads": 1, "max_tokens": 900, "max_trained_tokens": 40, "activation_mib": mib}
    needs = predict(sizes, config(training=chosen))
    reckoned = needs.activations + needs.contexts + needs.logits
    assert 0.2 * reckoned < taken < reckoned


@pytest.mark.parametrize("heads", [(8, 2), (2, 2)])
def test_what_attention_keeps_of_contexts_counts_as_activations(tmp_path, heads):
    """Its keys and values, written out for every query head."""
    trainer, optimizer = prepared(sharing(tmp_path / "model", heads), activation_mib=64)
    optimizer._note = lambda *_: UpdateResult(0.0, skipped=False)
    kept = 890 * 2 * 128 * 2 * 24  # of a context
    recompute, twice, wholes = trainer._recompute, list[bool](), list[float]()
    real = recompute._whole, recompute.within_budget
    recompute._whole = lambda: wholes.append(real[0]()) or wholes[-1]  # type: ignore[func-returns-value, method-assign]

    @contextmanager
    def noted(*given: int) -> Any:
        with real[1](*given):
            twice.append(recompute._on)
            yield

    recompute.within_budget = noted  # type: ignore[method-assign]
    trainer.step(of([(2, 890)]))
    assert kept < wholes[-1] < 1.1 * kept
    trainer.step(of([(101, 0)]))  # the first of them is predicted by none
    assert recompute._bytes_per_token
    for budget in (1.2, 0.9):
        recompute._budget = int(budget * kept)
        trainer.step(of([(2, 890)]))
    assert twice == [False, False, False, True]


@pytest.mark.parametrize("mib", [16, 64])
def test_the_contexts_of_a_pass_go_with_it(tmp_path, mib):
    """In a step of several passes, whose rows wait for its end; layers computed twice, and once."""
    trainer, _ = prepared(sharing(tmp_path / "model", (2, 2)), activation_mib=mib)
    trainer._activations = mib << 20
    real, states, alive = trainer._read, list[Any](), list[int]()

    def read(work: Any) -> None:
        gc.collect()
        alive.append(sum(state() is not None for state in states))
        real(work)
        states.extend(weakref.ref(keys) for one in work for keys in one.after.layers)

    trainer._read = read  # type: ignore[method-assign]
    trainer.step(of([(2, 890)] * 6))
    assert alive == [0, 0, 0], "three passes, and one part"


@pytest.mark.parametrize("examples", [LONG, READ], ids=["a long text", "contexts"])
def test_scores_that_are_made_all_at_once_are_reckoned(tmp_path, examples):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    folder = build("gemma2", tmp_path / "model", max_position_embeddings=1024, **sizes)
    trainer, optimizer = prepared(folder, activation_mib=0)
    trainer._activations, optimizer._note = 0, lambda *_: UpdateResult(0.0, skipped=False)
    items = of(examples)
    trainer.step(items)
    taken = peak(lambda: trainer.step(items))
    model = examine(folder, load_arena(folder).layout).sizes
    chosen = config(training={"threads": 1, "max_tokens": 900, "activation_mib": 0})
    needs, without = (predict(one, chosen) for one in (model, replace(model, scores=0)))
    assert taken < needs.activations + needs.contexts + needs.logits
    assert taken > without.activations + without.contexts + without.logits or examples is READ


def test_what_attention_keeps_and_whether_logits_are_bounded_is_read_from_the_model(tmp_path):
    plain, gemma = qwen2(tmp_path / "plain"), build("gemma2", tmp_path / "gemma")
    sizes = [examine(folder, load_arena(folder).layout).sizes for folder in (plain, gemma)]
    assert [one.scores for one in sizes] == [0, 4], "Gemma 2 bounds those of its attention too"
    assert sizes[0].state == 2 * 2 * 2 * 8  # layers, keys and values, heads, width
    assert [one.softcaps for one in sizes] == [False, True]
    assert not any(one.scans or one.waits for one in sizes)


def test_scans_that_are_not_reckoned_and_weights_that_layers_share_are_told(tmp_path):
    folder = build("zamba2", tmp_path / "model")
    sizes = examine(folder, load_arena(folder).layout).sizes
    assert sizes.scans
    assert sizes.waits > 0
    chosen = config(training={"threads": 1, "max_tokens": 600})
    more = predict(sizes, chosen).activations - predict(replace(sizes, waits=0), chosen).activations
    assert more == 600 * sizes.waits
    about = {"sizes": {**vars(sizes)}, "weights_nbytes": 0, "gpu_nbytes": 0, "device": "GPU-x"}
    (finding,) = doctor_model._fits(about, chosen)
    assert "of the activations are for the scans of its recurrent layers" in finding.found
    about["sizes"]["scan"] = 0  # its code hides how large their states are
    (finding,) = doctor_model._fits(about, chosen)
    assert "what the scans of its recurrent layers take for a moment is not in it" in finding.found


def test_the_rows_of_a_weight_that_layers_share_are_reckoned(tmp_path):
    folder = build("zamba2", tmp_path / "model")
    sizes, given = examine(folder, load_arena(folder).layout).sizes, dict[str, int]()
    trainer, optimizer = prepared(folder, activation_mib=0)

    def update(name: str, _weight: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> UpdateResult:
        given[name] = len(x)
        return UpdateResult(0.0, skipped=False)

    optimizer.update_linear = update  # type: ignore[method-assign]
    trainer.step(of([(101, 0)]))  # the first of them is predicted by none
    times = {name: rows / 100 for name, rows in given.items() if rows > 100}
    assert sizes.uses == times
    assert set(times.values()) == {2}
    chosen = config(training={"threads": 1, "max_tokens": 20_000})
    shared = predict(sizes, chosen).update - predict(replace(sizes, uses={}), chosen).update
    assert shared > 4 * 3 * (40_000**2 - 21_000**2), "[Y P^T | Y Y^T] grows with their square"


def test_what_vllm_leaves():
    gib = 2**30
    assert gpu_memory.left(80 * gib, []) == int(80 * gib * (1 - 0.92))
    for arguments in (
        ["--gpu-memory-utilization", "0.7"],
        ["--port", "1", "--gpu-memory-utilization=0.7"],
        ["--gpu_memory_utilization", "0.7"],
        ["--gpu_memory_utilization=0.7"],
    ):
        assert gpu_memory.left(100 * gib, arguments) == int(100 * gib * (1 - 0.7))
    assert gpu_memory.left(100, ["--gpu-memory-utilization"]) == int(100 * (1 - 0.92))


def fits(total_gib: int, **tables: Any) -> Any:
    about = {
        "sizes": {**vars(LLAMA)}, "weights_nbytes": 15 * 2**30, "gpu_nbytes": total_gib * 2**30, "device": "GPU-x",
    }  # fmt: skip
    (finding,) = doctor_model._fits(about, config(**tables))
    return finding


def test_the_doctor_says_how_much_it_is_and_whether_there_is_room():
    roomy = fits(192)
    assert roomy.level == "ok"
    assert "beside 15.0 GiB of weights, training takes at most" in roomy.found
    assert f"{predict(LLAMA, Config())}" in roomy.found
    tight = fits(24)
    assert tight.level == "warn"
    assert "vLLM leaves 1.9 of 24.0" in tight.found
    share = float(tight.fix.split("--gpu-memory-utilization ")[1].split(",")[0])
    assert fits(24, server={"arguments": ["--gpu-memory-utilization", str(share)]}).level == "ok"
    assert fits(24, server={"arguments": ["--gpu-memory-utilization", str(share + 0.02)]}).level == "warn"
    assert fits(0).level == "ok", "a size that is not known is not complained about"


def test_the_doctor_names_a_limit_that_is_too_low():
    needs = predict(LLAMA, Config())
    low = fits(192, training={"gpu_memory_gib": 1})
    assert low.level == "warn"
    assert "training.gpu_memory_gib allows 1" in low.found
    allowed = int(low.fix.split("allow ")[1].split(",")[0])
    assert allowed * 2**30 >= needs.total - needs.context > (allowed - 1) * 2**30
    assert fits(192, training={"gpu_memory_gib": allowed}).level == "ok"


@pytest.mark.parametrize(
    ("preset", "card_mib", "model"),
    [
        ("gpu-24gb", 23034, shaped(4096, 14336, 32, 4096, 1024, 32768)),  # Mistral 7B on an L4
        ("gpu-24gb", 23034, shaped(3584, 18944, 28, 3584, 512, 152064)),  # Qwen 2.5 7B
        ("gpu-80gb", 81559, LLAMA),  # on an H100
        ("gpu-80gb", 81559, shaped(5120, 32768, 40, 4096, 1024, 131072)),  # Mistral Small 24B
        ("gpu-80gb", 143771, shaped(5120, 25600, 64, 8192, 1024, 151936)),  # Qwen3 32B on an H200
    ],
)
def test_what_a_preset_allows_is_there_and_enough_for_the_models_it_names(preset, card_mib, model):
    chosen = tomllib.loads((REPOSITORY / "config" / "presets" / f"{preset}.toml").read_text())
    settings = Config.model_validate(chosen)
    needs, allowed = predict(model, settings), settings.training.gpu_memory_gib * 2**30
    assert needs.total - needs.context <= allowed
    left = gpu_memory.left(card_mib << 20, settings.server.arguments)
    assert allowed + needs.context <= left
    about = {"sizes": {**vars(model)}, "weights_nbytes": 0, "gpu_nbytes": card_mib << 20}
    assert [finding.level for finding in doctor_model._fits(about, settings)] == ["ok"]
    weights = 2 * sum(math.prod(shape) for shape in model.trained.values())
    weights += 2 * model.vocabulary * model.hidden
    assert weights < (card_mib << 20) - left, "and vLLM's part holds the model"


def test_nothing_is_said_of_a_gpu_where_there_is_none(tmp_path: Path):
    from hogwild.coverage import main

    folder = qwen2(tmp_path / "model")
    about = main(folder, load_arena(folder).layout.to_json())
    assert (about["device"], about["gpu_nbytes"]) == ("cpu", 0)
