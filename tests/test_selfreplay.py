"""Texts that a model writes itself before it is trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from architectures import ARCHITECTURES
from hogwild import selfreplay, skeleton
from hogwild.config import load
from hogwild.curriculum import Curriculum
from hogwild.errors import HogwildError
from hogwild.examples import parse_line
from hogwild.learner import Learner
from hogwild.ledger import GoodLine, Ledger
from hogwild.likeliest import Likeliest
from hogwild.weights import Weights, digest, load_arena
from support import wait_until
from tiny import llama, tokenizer

ROWS = [architecture for architecture in ARCHITECTURES if not architecture.refused]
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w2{% endif %}"

TEMPLATE_OF_PARTS = TEMPLATE.replace(
    "{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = llama(tmp_path_factory.mktemp("model"))
    tokenizer(folder)
    return folder


def write(folder: Path, seed: int = 0, count: int = 6, tokens: int = 8, **options) -> list[selfreplay.Sample]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    given = selfreplay.prompts(words, count)
    return selfreplay.make(model, given, selfreplay.ends(model, words), tokens=tokens, seed=seed, **options)


def ids(samples: list[selfreplay.Sample]) -> list[tuple[int, ...]]:
    return [one.ids for one in samples]


def test_the_same_seed_writes_the_same_texts(folder):
    assert ids(write(folder)) == ids(write(folder))
    assert ids(write(folder)) != ids(write(folder, seed=1))


def test_a_text_is_what_the_model_would_write_one_token_at_a_time(folder):
    """Batches with padding and a cache give every token the probability that the whole text gives it: a sharp model,
    which always writes its likeliest token, writes what it would write alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(200)  # so sharp that sampling is choosing the likeliest
    given = [[5], [7, 9, 11, 4], [8, 6]]
    for sample in selfreplay.make(model, given, [2], tokens=6, seed=0):
        ids = list(sample.ids[: sample.start])
        assert ids in given
        while len(ids) < len(sample.ids):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids) == sample.ids


@pytest.mark.parametrize("architecture", ROWS, ids=lambda one: one.name)
def test_texts_of_every_architecture_go_on_from_what_they_begin_with(tmp_path, architecture):
    """Each model calls its cache as it likes, and most swallow what they do not know and read every token alone."""
    folder = architecture.build(tmp_path / "model", torch.float32)
    model = skeleton.build(folder, Weights(load_arena(folder)))
    for sample in selfreplay.make(model, [[5, 9, 11, 17, 21], [7, 8]], (), tokens=6, seed=0, greedy=True):
        ids = list(sample.ids)
        with torch.no_grad():
            likeliest = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
        assert likeliest[sample.start - 1 : -1] == ids[sample.start :]


def test_what_it_thought_is_what_it_thinks_of_the_whole_text(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for sample in write(folder):
        with torch.no_grad():
            logits = model(torch.tensor([sample.ids])).logits[0, sample.start - 1 : -1]
        logs = logits.log_softmax(-1)
        torch.testing.assert_close(
            logs.gather(-1, sample.likeliest.ids), sample.likeliest.logs, atol=1e-4, rtol=0
        )
        assert (logs.topk(8).indices == sample.likeliest.ids).float().mean() > 0.99
        assert float(sample.likeliest.divergence(logits).abs().max()) < 1e-3


def test_the_divergence_is_that_of_the_likeliest_and_the_rest_and_its_gradient_is_zero_at_home():
    torch.manual_seed(0)
    home, away = torch.randn(5, 30), torch.randn(5, 30)
    likeliest = Likeliest.of(home, 4)
    p, q = home.softmax(-1), away.softmax(-1)
    for row, ids in enumerate(likeliest.ids):
        ps = torch.cat([p[row, ids], 1 - p[row, ids].sum(0, keepdim=True)])
        qs = torch.cat([q[row, ids], 1 - q[row, ids].sum(0, keepdim=True)])
        wanted = (ps * (ps / qs).log()).sum()
        torch.testing.assert_close(likeliest.divergence(away)[row], wanted, atol=1e-5, rtol=1e-4)
    home.requires_grad_(True)
    likeliest.divergence(home).sum().backward()
    assert float(home.grad.abs().max()) < 1e-5
    sure = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)  # no probability is left for the rest
    Likeliest.of(sure.detach(), 2).divergence(-sure).sum().backward()
    assert bool(sure.grad.isfinite().all())


def test_a_text_ends_with_its_first_end_token_or_at_its_length(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = selfreplay.make(model, [[5]] * 40, range(3, 20), tokens=8, seed=0)
    assert len(samples) == 40
    written = [one.ids[one.start :] for one in samples]
    assert all(3 <= text[-1] < 20 or len(text) == 8 for text in written)
    assert not any(3 <= token < 20 for text in written for token in text[:-1])
    assert len({len(text) for text in written}) > 2
    assert samples[0].trained == [False] + [True] * len(written[0])


@pytest.mark.parametrize(
    "row", [one for one in ROWS if one.name == "Llama" or one.row == "vision"], ids=lambda one: one.name
)
def test_texts_end_where_a_server_stops(tmp_path, row):
    """generation_config.json says it of many chat models, and the configuration's part about text of those that see."""
    folder = row.build(tmp_path)
    words = SimpleNamespace(eos_token_id=5)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert selfreplay.ends(skeleton.empty(folder), words) == {2, 5}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 77]}')
    assert selfreplay.ends(skeleton.empty(folder), words) == {2, 5, 77}


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE_OF_PARTS], ids=["text", "parts"])
def test_half_are_chats_where_there_is_a_template(folder, template, monkeypatch):
    """As the server asks: some templates, of models that see, take parts alone."""
    words = AutoTokenizer.from_pretrained(folder)
    assert all(len(given) == 1 for given in selfreplay.prompts(words, 20))
    words.chat_template = template
    monkeypatch.setattr(selfreplay, "QUESTIONS", ("w7 w8",))
    given = selfreplay.prompts(words, 20)
    assert given[1] == words.convert_tokens_to_ids(["w1", "w7", "w8", "</s>", "w2"])
    w1, w2 = words.convert_tokens_to_ids(["w1", "w2"])
    assert [one[0] == w1 and one[-1] == w2 for one in given] == [False, True] * 10


def test_time_that_is_up_leaves_the_rest_out_and_a_stop_drops_the_round(folder):
    cut = write(folder, count=40, tokens=60, limit_s=0)
    assert len(cut) == selfreplay.ROUND
    assert max(len(one.ids) - one.start for one in cut) == selfreplay.FEW_TOKENS
    assert write(folder, stopped=lambda: True) == []


def test_the_file_belongs_to_one_model_and_is_whole_or_not_there(tmp_path):
    path = tmp_path / "selfreplay.json"
    samples = [
        selfreplay.Sample((1, *range(count)), 1, Likeliest.of(torch.randn(count, 20))) for count in (3, 2)
    ]
    assert selfreplay.load(path, "base") is None
    selfreplay.save(path, "base", 0, samples)
    found = selfreplay.load(path, "base")
    assert [(one.ids, one.start) for one in found] == [(one.ids, one.start) for one in samples]
    for one, wanted in zip(found, samples, strict=True):
        assert torch.equal(one.likeliest.ids, wanted.likeliest.ids)
        torch.testing.assert_close(one.likeliest.logs, wanted.likeliest.logs, atol=1e-4, rtol=0)
    assert selfreplay.load(path, "another model") is None
    assert [file.name for file in tmp_path.iterdir()] == ["selfreplay.json"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(HogwildError, match="delete it"):
        selfreplay.load(path, "base")


def learner_on(folder: Path, state: Path, ledger: Ledger, **settings) -> Learner:
    config = load(
        None,
        {
            "state_dir": str(state),
            "training.threads": 1,
            "replay.self_texts": 8,
            "replay.self_tokens": 6,
            **settings,
        },
    )
    return Learner(load_arena(folder), folder, config, ledger, Curriculum(ledger, config.replay))


def drop(ledger: Ledger, *lines: str) -> None:
    good = [GoodLine(i, 0, line.encode(), parse_line(line.encode())) for i, line in enumerate(lines, 1)]
    ledger.accept_file("a.jsonl", "hash", good, passes=2)


def test_a_learner_writes_them_before_it_trains_and_mixes_them_in(folder, tmp_path):
    path, base = tmp_path / "selfreplay.json", digest(folder)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        drop(ledger, *(f'{{"text": "w{i} w{i + 1} w{i + 2} w9"}}' for i in range(3)))
        learner = learner_on(folder, tmp_path, ledger)
        taken = []
        take = learner.curriculum.take

        def watch(*args, **options):
            batch = take(*args, **options)
            taken.append((path.exists(), batch and (len(batch.new), len(batch.replayed), len(batch.own))))
            return batch

        learner.curriculum.take = watch
        learner.write_own_texts(path, base)
        learner.start()
        wait_until(
            lambda: learner.failure or (ledger.is_idle() and not learner.curriculum.in_flight), "trained"
        )
        assert learner.failure is None
        assert learner.stop(60)
        batches = [batch for _, batch in taken if batch]
        assert all(there for there, _ in taken)
        assert batches[:3] == [(1, 0, 1)] * 3
        assert len(batches) == 6
        assert ledger.counts().passes == 6
    made = json.loads(path.read_bytes())["samples"]
    assert len(made) == 8
    # They are the untrained model's: another learner on the same model writes the same, or reads them.
    with Ledger(tmp_path / "another" / "ledger.sqlite") as ledger:
        again = tmp_path / "another" / "selfreplay.json"
        learner = learner_on(folder, tmp_path, ledger)
        learner.write_own_texts(again, base)
        learner.wait_for_own_texts()
        assert learner.stop(60)
        assert json.loads(again.read_bytes())["samples"] == made
        reader = learner_on(folder, tmp_path, ledger)
        reader.progress.advance()  # trained since
        reader.write_own_texts(path, base)
        assert [list(one.ids) for one in reader.curriculum.replay.own] == [one["ids"] for one in made]
        late = learner_on(folder, tmp_path, ledger)
        late.progress.advance()
        late.write_own_texts(tmp_path / "missing.json", base)  # too late to write any
        assert not late.curriculum.replay.own
        assert not (tmp_path / "missing.json").exists()


def test_without_replay_or_texts_none_are_written(folder, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for settings in ({"replay.ratio": 0}, {"replay.self_texts": 0}):
            learner = learner_on(folder, tmp_path, ledger, **settings)
            learner.write_own_texts(tmp_path / "selfreplay.json", "base")
            learner.wait_for_own_texts()
            assert not (tmp_path / "selfreplay.json").exists()


def test_a_failure_to_write_them_does_not_stop_the_training(folder, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        drop(ledger, '{"text": "w1 w2 w3"}')
        learner = learner_on(folder, tmp_path, ledger)
        (tmp_path / "no-folder").write_text("a file")
        learner.write_own_texts(tmp_path / "no-folder" / "selfreplay.json", "base")
        learner.start()
        wait_until(lambda: learner.failure or ledger.is_idle(), "trained")
        assert learner.failure is None
        assert learner.stop(60)
