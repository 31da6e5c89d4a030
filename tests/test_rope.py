"""Rotary frequencies that follow from a length: a text comes out the same beside any other, and as the server has it.

The real vLLM has its say in tests/test_architectures.py, and in the rows of the matrix.
"""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hogwild import probes, rope, selfreplay, served, skeleton
from hogwild.apollo import Optimizer
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena
from studio import Studio
from support import wait_until
from test_trainer import Example
from tiny import SIZES, WORDS, llama, tokenizer

ORIGINAL, LONGEST = 32, 48
"""Beyond the texts with which a trainer tries whether a model's texts can be packed (24 tokens), as in a real model."""
HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
ROPES = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * HALF, "long_factor": [4.0 + i for i in range(HALF)],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


def text(seed: int, context: int, trained: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (context + trained,), generator=generator).tolist()
    return Example(ids, [False] * context + [True] * trained)


SHORT, LONG = text(1, 4, 6), text(2, 30, 8)


@pytest.fixture(params=ROPES)
def folder(request, tmp_path: Path) -> Path:
    long = 128 if request.param == "longrope" else ORIGINAL
    return llama(tmp_path / "model", max_position_embeddings=long, rope_parameters=ROPES[request.param])


def trainer(folder: Path, longest: int | None = LONGEST, context: str = "frozen") -> Trainer:
    """As on the arena of a server that takes texts of `longest` tokens."""
    weights = Weights(load_arena(folder))
    weights.arena.max_model_len = longest
    optimizer = Optimizer(OptimizerConfig(lr=1e-12, rank=4), 0)
    model = skeleton.build(folder, weights)
    return Trainer(model, optimizer, Progress(weights.arena.control, 4), set(weights.names), context, seed=0)


@pytest.mark.parametrize("longest", [ORIGINAL - 1, LONGEST])
def test_a_loss_is_the_same_alone_beside_a_long_text_and_after_one(folder, longest):
    made = trainer(folder, longest)
    assert made._packs, "otherwise nothing is beside another"
    alone = made.step([Item(SHORT)]).losses[0]
    beside, long = made.step([Item(SHORT), Item(LONG)]).losses
    assert beside == pytest.approx(alone, abs=1e-5)
    assert made.step([Item(SHORT)]).losses[0] == pytest.approx(alone, abs=1e-5)
    assert made.step([Item(LONG)]).losses[0] == pytest.approx(long, abs=1e-5)
    assert made.loss(LONG) == pytest.approx(long, abs=1e-5), "nor does it matter what was read beforehand"


def plainly(folder: Path, length: int) -> tuple[Example, float]:
    """A text of so many tokens, and its loss in transformers itself."""
    whole = text(3, 1, length)
    whole = Example(whole.ids[:length], whole.trained[:length])
    ids = torch.tensor([whole.ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    return whole, float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))


@pytest.mark.parametrize("folder", ["longrope"], indirect=True)
@pytest.mark.parametrize(("length", "other"), [(ORIGINAL, LONGEST), (LONGEST, ORIGINAL)])
def test_the_side_is_that_of_the_longest_text_that_the_server_takes(folder, length, other):
    """Against transformers itself, on one text that is as long as that."""
    whole, expected = plainly(folder, length)
    assert trainer(folder, length).loss(whole) == pytest.approx(expected, abs=1e-5)
    assert trainer(folder, other).loss(whole) != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("folder", ["dynamic"], indirect=True)
def test_dynamic_ones_are_those_that_the_model_has_positions_for(folder):
    """Whatever texts the server takes: vLLM makes them once, where transformers stretches them for a longer text."""
    whole, expected = plainly(folder, ORIGINAL)
    for longest in (ORIGINAL - 1, LONGEST, None):
        assert trainer(folder, longest).loss(whole) == pytest.approx(expected, abs=1e-5)
    longer, stretched = plainly(folder, LONGEST)
    assert trainer(folder, LONGEST).loss(longer) != pytest.approx(stretched, abs=1e-4)


@pytest.mark.parametrize("folder", ["longrope"], indirect=True)
@pytest.mark.parametrize(("stated", "side"), [(False, LONGEST), (True, ORIGINAL)])
def test_without_a_server_it_is_the_side_that_vllm_takes_unless_told(folder, stated, side):
    """Also with a server of an older hogwild, which does not say. vLLM keeps to `original_max_position_embeddings`
    where a configuration has it beside its rotary parameters, as that of Phi-3 has."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if stated:
        config["original_max_position_embeddings"] = ORIGINAL
    path.write_text(json.dumps(config))
    told, untold = trainer(folder, side), trainer(folder, None)
    assert untold.loss(LONG) == told.loss(LONG)
    assert not rope.differs(untold.model, side)
    assert rope.differs(untold.model, {LONGEST: ORIGINAL, ORIGINAL: LONGEST}[side])


@pytest.mark.parametrize("folder", ["longrope"], indirect=True)
def test_a_new_server_on_the_same_weights_brings_its_own(folder, tmp_path, monkeypatch):
    """Restarted with another --max-model-len, it maps the memory that the daemon holds. Not under a trainer's hands."""
    tokenizer(folder)
    studio = Studio(tmp_path)
    learner = studio.learner
    learner.wait_for_own_texts()
    attachment = studio.attachment()
    models, seen = [learner.reader, *(one.model for one in learner.trainers)], []
    agreed = served.Agreement(0.0, 0.0, 1.0, 1)
    monkeypatch.setattr(served.Server, "ready", lambda _self: True)
    monkeypatch.setattr(learner, "check_served", lambda _server: seen.append(learner.training) or agreed)
    for number, longest in enumerate([LONGEST, LONGEST, ORIGINAL, LONGEST]):
        attachment.on_session({"url": "", "max_model_len": longest}, begins=True)
        changes = rope.differs(learner.reader, longest)
        assert changes == (number > 1)
        attachment.check(after="attach")
        assert not any(rope.differs(model, longest) for model in models)
        assert learner.training
    assert seen == [False, True, False, False], "at rest while they change"
    studio.close()


def test_a_model_whose_frequencies_never_change_is_left_as_it_is(tmp_path):
    folder = llama(tmp_path / "model")
    model = skeleton.build(folder, Weights(load_arena(folder)))
    assert not list(rope._changing(model))
    assert not rope.differs(model, 10_000)
    before = model.model.rotary_emb.inv_freq.clone()
    rope.fix(model, 10_000)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


WATCHED: dict[str, Any] = {"optimizer__lr": 1e-9, "probes__margin": 1e-5, "probes__every_updates": 0}
"""Weights hardly move, and probes fall with the least that comes of other frequencies."""


class Bench:
    """A daemon's learner on the longrope model, and servers that come to it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (root / "probes.jsonl").write_text(json.dumps({"text": " ".join(WORDS[:24])}) + "\n")
        self.settings = {**WATCHED, "probes__file": root / "probes.jsonl"}
        self.studio = Studio(root, **self.settings)
        self.attachment, self.learner = self.studio.attachment(), self.studio.learner
        self.agreed = served.Agreement(0.0, 0.0, 1.0, 1)
        monkeypatch.setattr(served.Server, "ready", lambda _self: True)
        monkeypatch.setattr(self.learner, "check_served", lambda _server: self.agreed)

    def server(self, longest: int) -> None:
        self.attachment.on_session({"url": "", "max_model_len": longest}, begins=True)
        self.attachment.check(after="attach")

    def checked(self) -> bool:
        self.attachment.check(after="attach")
        return not self.attachment.must_check


@pytest.mark.parametrize("folder", ["longrope"], indirect=True)
def test_probes_are_held_against_what_they_were_with_the_frequencies_of_the_server(
    folder, tmp_path, monkeypatch
):
    """Or a server with another --max-model-len would have what was learned rolled back, and set aside."""
    tokenizer(folder)
    bench = Bench(tmp_path, monkeypatch)
    studio, judge = bench.studio, bench.learner.judge
    bench.learner.wait_for_own_texts()
    bench.server(LONGEST)
    studio.drop("facts.jsonl", 2)
    studio.train()
    studio.save()
    judge.judge()
    assert judge.tripped is None
    known = dict(judge.probes.good.losses)
    bench.server(ORIGINAL)
    bench.learner.pause()
    score = judge.judge()
    assert any(abs(score.losses[name] - known[name]) > 1e-5 for name in known), "it matters at all"
    assert judge.tripped is None
    studio.save()
    arena = studio.close()
    arena.max_model_len = LONGEST  # the daemon starts again, and the server with it, as it was at first
    again = Studio(tmp_path, arena, **bench.settings)
    again.learner.wait_for_own_texts()
    again.learner.judge.judge()
    assert again.learner.judge.tripped is None
    again.close()


@pytest.mark.parametrize("folder", ["longrope"], indirect=True)
def test_frequencies_wait_for_whoever_reads_the_model(folder, tmp_path, monkeypatch):
    """A score half with these and half with those would be nobody's; so would texts that the model writes."""
    tokenizer(folder)
    reading, go_on = threading.Event(), threading.Event()
    sample, score = selfreplay.make, probes.Probes.score

    def slow(*given: Any, **options: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return sample(*given, **options)

    monkeypatch.setattr(selfreplay, "make", slow)
    bench = Bench(tmp_path, monkeypatch)
    learner = bench.learner
    assert reading.wait(60)
    bench.server(ORIGINAL)
    assert rope.differs(learner.reader, ORIGINAL), "its own texts are being written"
    assert bench.attachment.must_check
    go_on.set()
    learner.wait_for_own_texts()
    bench.attachment.check(after="attach")
    assert bench.attachment.must_check, "it does not ask in every turn"
    wait_until(bench.checked, "they change")
    assert not rope.differs(learner.reader, ORIGINAL)
    learner.pause()

    def slowly(self: probes.Probes, *given: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return score(self, *given)

    reading.clear(), go_on.clear()
    monkeypatch.setattr(probes.Probes, "score", slowly)
    about = {
        "base_path": str(folder),
        "base_digest": bench.studio.ledger.get_meta("base_digest"),
        "config": {},
    }
    bench.studio.keeper.start_saving(learner, about)
    assert reading.wait(60)
    bench.server(LONGEST)
    assert rope.differs(learner.reader, LONGEST), "a checkpoint is being judged"
    go_on.set()
    assert not isinstance(bench.studio.keeper.saved(wait=True), Exception)
    wait_until(bench.checked, "they change")
    assert not rope.differs(learner.reader, LONGEST)
    bench.studio.close()


@pytest.mark.parametrize("folder", ["longrope"], indirect=True)
def test_a_server_that_comes_while_frequencies_change_is_asked_too(folder, tmp_path, monkeypatch):
    """The one that they were for was killed, and is there again with others."""
    tokenizer(folder)
    bench = Bench(tmp_path, monkeypatch)
    bench.learner.wait_for_own_texts()
    learner, quiet = bench.learner, bench.learner.quiet

    def comes(timeout_s: float) -> bool:
        monkeypatch.setattr(learner, "quiet", quiet)
        bench.attachment.on_session({"url": "", "max_model_len": LONGEST}, begins=True)
        return quiet(timeout_s)

    monkeypatch.setattr(learner, "quiet", comes)
    bench.server(ORIGINAL)
    assert bench.attachment.must_check
    bench.attachment.check(after="attach")
    assert not rope.differs(learner.reader, LONGEST)
    assert not bench.attachment.must_check
    bench.studio.close()
