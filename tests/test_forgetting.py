"""The benchmark of forgetting: its questions are fair, its examiner counts right, and a short run goes through."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hogwild.examples import parse_line
from tiny import llama, tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import forgetting
import forgetting_measure
from forgetting_facts import FINAL, TUNING

TEMPLATE = (
    "{% for m in messages %}{{ 'w2' if m['role'] == 'assistant' else 'w1' }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    folder = llama(tmp_path / "model", max_position_embeddings=256)
    tokenizer(folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    return folder


def test_no_held_out_question_is_trained_and_no_two_facts_share_a_subject():
    facts = FINAL.facts(100)
    assert len({fact.subject for fact in facts}) == 100
    trained = {question for fact in facts for question in fact.asked()}
    held_out = [question for fact in facts for question in fact.held_out]
    assert len(trained) == len(held_out) == 300
    assert not trained & set(held_out)
    assert not any(fact.answer in question for fact in facts for question in [*fact.held_out, *fact.asked()])
    for fact in facts:
        examples = [parse_line(line.encode()) for line in fact.lines("x")]
        assert len(examples) == 4
        assert all(fact.answer in (one.text or one.messages[-1]["content"]) for one in examples)
    assert FINAL.facts(100) == facts


def test_the_world_to_tune_on_shares_nothing_with_the_final_one():
    templates = [
        {text for relation in world.relations for text in (*relation.held_out, *sum(relation.trained, ()))}
        for world in (TUNING, FINAL)
    ]
    assert templates[0] & templates[1] == {""}
    names = [{fact.subject for fact in world.facts(100)} for world in (TUNING, FINAL)]
    assert not names[0] & names[1]


def test_answers_of_a_batch_are_those_of_one_question_at_a_time(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    exam = forgetting_measure.Exam(model, AutoTokenizer.from_pretrained(folder))
    questions = ["w5 w6", "w5 w7 w8 w9 w10", "w11", "w5"]
    alone = []
    for question in questions:
        ids = exam._prompt(question)
        start = len(ids)
        while len(ids) - start < forgetting_measure.ANSWER_TOKENS and (len(ids) == start or ids[-1] != 2):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(exam._text_of(ids[start:]))
    assert exam.answers(questions) == alone
    first = alone[1].split()[0]
    assert exam.hits([(questions[1], first), (questions[1], "no such word")]) == [True, False]


def test_a_short_run_goes_through_and_is_not_repeated(folder, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    command = [
        "forgetting.py", "--model", str(folder), "--world", "tuning", "--facts", "4", "--drops", "2",
        "--only", "default", "--set", "training.passes=1", "--set", "replay.self_texts=4",
        "--results", str(results),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(forgetting.demo_model, "build", lambda path: path)
    monkeypatch.setattr(
        forgetting.logs, "configure", lambda *_: None
    )  # it would last for every test after this
    forgetting.main()
    done = json.loads(results.read_text())["default"]
    assert [drop["facts"] for drop in done["drops"]] == [2, 4]
    assert done["drops"][-1]["steps"] == 16
    assert done["end"]["own_texts"]["texts"] == 4
    assert "| replay and self-replay | " in capsys.readouterr().out
    written = results.stat().st_mtime_ns
    forgetting.main()
    assert results.stat().st_mtime_ns == written
