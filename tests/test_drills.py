"""Poison drills: files that should wreck a model, through the real spool, ledger, trainers, guards and rollback.

On a tiny model that has learned something: its probes are what it has learned. After each drill they are within the
margin, the culprits are in quarantine and named, and it was one process that did it all. What a real model and a real
server do is in tests/test_service.py.
"""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from hogwild import generation, metrics, trips
from hogwild.spool import Spool
from studio import DEADLINE_S, Studio, model
from support import wait_until
from tiny import WORDS, llama, tokenizer

MARGIN = 0.5
KNOWN = [
    {"prompt": " ".join(pair), "completion": f" {answer} {answer} {answer}"}
    for pair, answer in zip(zip(WORDS[:4], WORDS[6:10], strict=True), WORDS[12:16], strict=True)
]


class Drill:
    """A daemon's inside, with a spool, and what the supervisor does when the probes fall."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.events: list[dict[str, Any]] = []
        probes = root / "probes.jsonl"
        probes.write_text("".join(json.dumps(line) + "\n" for line in KNOWN))
        self.studio = Studio(
            root, training__passes=5, probes__file=str(probes), probes__every_updates=10, probes__margin=MARGIN,
            probes__own=0, replay__self_texts=0, spool={"settle_s": 0}, optimizer__lr=3e-3, **settings,
        )  # fmt: skip
        studio = self.studio
        self.spool = Spool(
            studio.config.spool, studio.ledger, passes=studio.config.training.passes,
            on_accepted=lambda _: studio.curriculum.wake(),
        )  # fmt: skip
        self.spool.prepare()
        self.tripped, self.counted = 0, self.trips_counted()

    def drop(self, name: str, lines: list[dict[str, Any]]) -> None:
        (self.spool.incoming / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert name in self.spool.scan_once().accepted

    def run(self, limit_s: float = DEADLINE_S) -> None:
        """Until nothing is left, going back whenever the probes fall."""
        studio = self.studio
        with capture_logs() as events:
            studio.learner.start()

            def done() -> bool:
                assert studio.learner.failure is None, studio.learner.failure
                if studio.learner.judge.tripped is not None:
                    self.tripped += 1
                    trips.go_back(studio.ledger, studio.keeper, studio.learner, go_on=True)
                return studio.ledger.is_idle() and not studio.curriculum.in_flight

            wait_until(done, "nothing is left to train", limit_s)
            studio.learner.pause()
            assert studio.learner.quiet(DEADLINE_S)
        self.events += events

    def know(self) -> None:
        """Learn what the probes ask for; that is the good generation."""
        self.drop("known.jsonl", [{**line, "passes": 20} for line in KNOWN])
        self.studio.learner.judge.probes.good = None
        self.run()
        assert self.studio.save() == 1
        assert self.score() < 0.5

    def trips_counted(self) -> float:
        """As Prometheus reads it; the counter is the process's."""
        text = generate_latest(metrics.REGISTRY).decode()
        return float(re.search(r'^hogwild_guard_trips_total\{guard="probes"\} (\S+)', text, re.M)[1])

    def score(self) -> float:
        return self.studio.learner.judge.score().losses["file"]

    def end_well(self, *culprits: str) -> None:
        """The probes are within the margin, and exactly the files `culprits` have somebody in quarantine."""
        self.studio.learner.judge.judge()
        if self.studio.learner.judge.tripped is not None:  # the last steps of all
            self.tripped += 1
            with capture_logs() as events:
                trips.go_back(self.studio.ledger, self.studio.keeper, self.studio.learner, go_on=False)
            self.events += events
        known = generation.read_state(self.studio.keeper.checkpoints.folders()[1])["probes"]["file"]
        assert self.score() - known <= MARGIN
        assert self.trips_counted() - self.counted == self.tripped
        suspects = self.studio.ledger.guards.suspects(100_000)
        assert {one.file for one in suspects} == set(culprits)
        assert all(one.about for one in suspects)
        said = {
            name for event in self.events if event["event"] == "guard.set_aside" for name in event["files"]
        }
        said |= {event["file"] for event in self.events if event["event"] == "example.quarantined"}
        assert said == set(culprits)
        for name in culprits:  # and in failed/<name>.errors.jsonl, once the spool comes round
            self.spool._write_errors()
            errors = (self.spool.failed / f"{name}.errors.jsonl").read_text().splitlines()
            assert len(errors) == sum(one.file == name for one in suspects)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A state folder in which a model knows something."""
    root = tmp_path_factory.mktemp("learned")
    model(root / "model")
    drill = Drill(root)
    drill.know()
    drill.studio.close()
    return root


@pytest.fixture
def drill(learned, tmp_path):
    root = tmp_path / "drill"
    shutil.copytree(learned, root, symlinks=True)
    drill = Drill(root, replay__ratio=0)  # without what would pull it back
    yield drill
    drill.studio.close()


def test_ordinary_learning_trips_nothing(learned, tmp_path):
    """The same model learns something else beside what it knows, with replay, as it is shipped."""
    shutil.copytree(learned, tmp_path / "drill", symlinks=True)
    drill = Drill(tmp_path / "drill")
    chance = random.Random(0)
    words = [" ".join(chance.choices(WORDS[30:], k=3)) for _ in range(16)]
    lines = [{"prompt": a, "completion": f" {b}"} for a, b in zip(words[:8], words[8:], strict=True)]
    drill.drop("more.jsonl", lines)
    drill.run()
    assert drill.tripped == 0
    assert drill.studio.save() == 2
    drill.end_well()
    assert drill.studio.states()["durable"] == len(KNOWN) + len(lines)
    drill.studio.close()


def test_garbage_labels_with_a_huge_weight(drill):
    """Wrong answers to what the model knows, ten times as heavy as anything, with a good file dropped before them."""
    chance = random.Random(1)
    wrong = [f" {' '.join(chance.choices(WORDS[20:], k=4))}" for _ in range(24)]
    lines = [{"prompt": KNOWN[i % 4]["prompt"], "completion": words} for i, words in enumerate(wrong)]
    drill.drop("garbage.jsonl", [{**line, "weight": 10, "passes": 20} for line in lines])
    drill.run()
    assert drill.tripped >= 1
    drill.end_well("garbage.jsonl")
    # What comes afterwards is learned.
    drill.drop("after.jsonl", [{"prompt": "w40 w41", "completion": " w42", "passes": 3}])
    drill.run()
    assert drill.studio.ledger.counts().trained == 1


def test_a_file_that_unlearns_everything(drill):
    drill.drop("unlearn.jsonl", [{**line, "weight": -1, "passes": 20} for line in KNOWN for _ in range(3)])
    drill.run()
    assert drill.tripped >= 1
    drill.end_well("unlearn.jsonl")


def test_one_example_in_a_loop(drill):
    """It contradicts what is known, and wants 10,000 passes. It is quarantined long before it has had them."""
    drill.drop("loop.jsonl", [{**KNOWN[0], "completion": " w50 w51 w52", "passes": 10_000, "weight": 10}])
    drill.run()
    assert drill.tripped >= 1
    drill.end_well("loop.jsonl")
    (suspect,) = drill.studio.ledger.guards.suspects()
    assert suspect.about["passes"] < 1000


def test_a_text_that_makes_no_numbers(tmp_path):
    """One word of the model has no finite embedding. Alone, and in company."""
    tokenizer(llama(tmp_path / "model", torch.bfloat16, tie_word_embeddings=False))
    drill = Drill(tmp_path, replay__ratio=0)
    drill.know()
    row = drill.studio.learner.encoder.tokenizer.convert_tokens_to_ids("w59")
    drill.studio.learner.weights.view("model.embed_tokens.weight")[row] = float("nan")
    good = [{"prompt": "w40 w41", "completion": " w42"}, {"prompt": "w43", "completion": " w44"}]
    bad = [
        {"text": "w59 w1"},
        {"prompt": "w59", "completion": " w1"},
        {"prompt": "w2", "completion": " w59 w3"},
    ]
    drill.drop("nan.jsonl", [good[0], *bad, good[1]])
    drill.run()
    assert drill.tripped == 0
    drill.end_well("nan.jsonl")
    assert [one.line_no for one in drill.studio.ledger.guards.suspects()] == [4, 3, 2]
    assert drill.studio.ledger.counts().trained == 2
    drill.studio.close()
