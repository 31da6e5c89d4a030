"""What a learner refuses before it has a thread, and what it makes of lines once it has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from transformers import AutoTokenizer

from families import build
from hogwild import trainer
from hogwild.arena.client import Arena
from hogwild.config import load
from hogwild.curriculum import Curriculum
from hogwild.errors import VerificationError
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.lines import content_hash, read_lines
from hogwild.weights import load_arena
from support import wait_until
from tiny import llama, tokenizer


def test_a_server_whose_linear_layers_are_all_packed_is_refused(tmp_path: Path) -> None:
    """Norms alone could be trained; nobody who drops a file means that."""
    folder = llama(tmp_path / "model")
    tokenizer(folder)
    whole = load_arena(folder)
    packed = {name: "packed" for name in whole.layout.tensors if name.endswith("_proj.weight")}
    assert packed
    left = {name: region for name, region in whole.layout.tensors.items() if name not in packed}
    arena = Arena(whole.weights, whole.control, replace(whole.layout, tensors=left, frozen=packed))
    config = load(None, {"state_dir": str(tmp_path / "state")})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(VerificationError, match="nothing to train") as caught:
            Learner(arena, folder, config, ledger, Curriculum(ledger))
        assert set(packed) <= {problem.split(":")[0] for problem in caught.value.problems}
        assert Learner(whole, folder, config, ledger, Curriculum(ledger)).frozen


@pytest.mark.parametrize(
    ("family", "context", "said"),
    [("jamba", "frozen", ["jamba"]), ("jamba", "full", []), ("qwen3_5_text", "frozen", [])],
)
def test_context_that_cannot_be_frozen_is_said_and_tried_once_for_all_threads(
    tmp_path, monkeypatch, family, context, said
):
    folder = build(family, tmp_path / "model")
    tokenizer(folder)
    settings = {"state_dir": str(tmp_path / "state"), "training.threads": 3, "training.context": context}
    tried, judge = [], trainer.judge
    monkeypatch.setattr(trainer, "judge", lambda *arguments: tried.append(arguments) or judge(*arguments))
    with Ledger(tmp_path / "ledger.sqlite") as ledger, capture_logs() as logs:
        learner = Learner(load_arena(folder), folder, load(None, settings), ledger, Curriculum(ledger))
    assert [one["model_type"] for one in logs if one["event"] == "context.not_frozen"] == said
    assert [one.can_freeze for one in learner.trainers] == [family != "jamba"] * 3
    assert len(tried) == 1


# Only the newest answer shows its thought (w9): two turns do not fit into one sequence.
THINKS_LAST = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' and loop.last %}w9 {% endif %}"
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
TURNS = ("w1", "w2 w3", "w4", "w5")
CHAT = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, TURNS, strict=True)]


def test_lines_reach_the_trainer_with_all_that_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama(tmp_path / "model")
    tokenizer(folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = THINKS_LAST
    words.save_pretrained(folder)
    lines = [
        {"id": "both", "messages": CHAT, "train_on": "all", "context": "full", "weight": 2},
        {"id": "ignored", "messages": [{**CHAT[0], "name": "Bo"}, CHAT[1]]},
        {"id": "ignored-too", "messages": [{**CHAT[0], "name": "Al"}, CHAT[1]], "context": "frozen"},
        {"id": "long", "prompt": "w1", "completion": " ".join(["w1"] * 64)},  # the model's context is 64
        {"id": "stricter", "text": "w1 w2", "weight": 7},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"state_dir": str(tmp_path / "state"), "training.threads": 1, "replay.ratio": 0}
    config = load(None, settings)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        record = ledger.accept_file("a.jsonl", content_hash(path)[0], read_lines(path, 10_000), passes=1)
        learner = Learner(load_arena(folder), folder, config, ledger, Curriculum(ledger, config.replay))
        steps = []
        take = learner.trainers[0].step
        monkeypatch.setattr(learner.trainers[0], "step", lambda items: (steps.append(items), take(items))[1])
        monkeypatch.setattr("hogwild.examples.MAX_WEIGHT", 5)  # a line that an older version let in
        with capture_logs() as events:
            learner.start()
            wait_until(ledger.is_idle, "everything is trained or set aside")
            assert learner.stop(60)
        assert learner.failure is None
        after = ledger.file(record.file_id)
    assert (after.trained, after.failed) == (3, 2)
    assert [[item.context for item in items] for items in steps] == [["full", "full"], [None], ["frozen"]]
    first, second = steps[0]
    assert (sum(first.encoded.trained), sum(second.encoded.trained)) == (4, 3)
    assert first.weight == pytest.approx(2 * 2 * 4 / 7), "two sequences, one example of 7 tokens, weight 2"
    assert second.weight == pytest.approx(2 * 2 * 3 / 7)
    done = {event["id"]: event for event in events if event["event"] == "example.trained"}
    assert done["both"]["tokens"] == 7
    said = [(event["id"], event["code"]) for event in events if event["event"] == "example.caution"]
    assert said == [("ignored", "ignored")], "once a file"
    failed = {event["id"]: event["reason"] for event in events if event["event"] == "example.failed"}
    assert "the model's context is 64" in failed["long"]
    assert "must be between" in failed["stricter"]
