"""Does it learn new facts without forgetting? 100 invented facts in 10 drops, with and without replay.

    python benchmarks/forgetting.py            the final table: benchmarks/results/forgetting.json, docs/forgetting.png
    python benchmarks/forgetting.py --world tuning --facts 12 --drops 3 --set optimizer.lr=1e-4 --only default

Each fact has four wordings that are dropped (three questions with answers, one statement) and three questions that
never are. A question counts as known when the greedy answer contains the fact's answer. The learning is the daemon's
own (ledger, curriculum, learner) over weights without a server; the text for the perplexity is Python's own reference
documentation and licence. Finished runs are kept and not repeated; delete the results to start over.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import forgetting_measure as measure
from forgetting_facts import WORLDS, Fact
from forgetting_plot import show
from hogwild import config as configuration
from hogwild import demo_model
from hogwild import log as logs
from hogwild.curriculum import Curriculum
from hogwild.examples import parse_line
from hogwild.learner import Learner
from hogwild.ledger import GoodLine, Ledger
from hogwild.weights import digest, load_arena

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "forgetting.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},  # replay and the model's own texts: replayed at first, and updates are kept out of their directions
    "replay": {"replay.self_texts": 0},  # replay alone
    "none": {"replay.self_texts": 0, "replay.ratio": 0.0},
}


class Run:
    """One model that learns one drop after the other."""

    def __init__(self, model: Path, facts: Sequence[Fact], drops: int, settings: dict[str, Any]) -> None:
        self.facts, self.per_drop = facts, len(facts) // drops
        self._folder = tempfile.TemporaryDirectory()
        state = Path(self._folder.name)
        fixed = {
            "state_dir": str(state),
            "model": str(model),
            "training.threads": 1,
            "log.level": "warning",
            "replay.self_limit_s": 3600.0,  # a busy machine must not change what is measured; the seconds are reported
        }
        self.config = configuration.load(None, {**fixed, **settings})
        logs.configure("warning", "console")
        self.ledger = Ledger(state / "ledger.sqlite")
        training = self.config.training
        self.curriculum = Curriculum(
            self.ledger, self.config.replay, seed=training.seed, step_tokens=training.step_tokens
        )
        self.learner = Learner(load_arena(model), model, self.config, self.ledger, self.curriculum)
        self.exam = measure.Exam(self.learner.reader, self.learner.encoder.tokenizer)
        self.base = {"few": self.exam.text_loss(few=True), "all": self.exam.text_loss(few=False)}
        began = time.perf_counter()
        self.learner.write_own_texts(state / "selfreplay.json", digest(model))
        self.learner.wait_for_own_texts()
        self.own_texts_s = time.perf_counter() - began
        self.train_s = 0.0

    def drop(self, number: int) -> dict[str, Any]:
        """Learn drop `number` (from 0), and ask."""
        new = self.facts[number * self.per_drop : (number + 1) * self.per_drop]
        lines = [
            line
            for wording in zip(*(f.lines(f"{number}-{i}") for i, f in enumerate(new)), strict=True)
            for line in wording
        ]
        good = [GoodLine(i, 0, line.encode(), parse_line(line.encode())) for i, line in enumerate(lines, 1)]
        self.ledger.accept_file(f"drop-{number}.jsonl", str(number), good, passes=self.config.training.passes)
        began = time.perf_counter()
        self.curriculum.wake()
        self.learner.start()
        while not self.ledger.is_idle() or self.curriculum.in_flight:
            if self.learner.failure is not None:
                raise self.learner.failure
            time.sleep(0.05)
        self.learner.pause()
        self.train_s += time.perf_counter() - began
        so_far = self.facts[: (number + 1) * self.per_drop]
        one_each = [(f.held_out[(i + number) % len(f.held_out)], f.answer) for i, f in enumerate(so_far)]
        return {
            "drop": number + 1,
            "facts": len(so_far),
            "steps": self.learner.progress.steps,
            "paraphrases": self.exam.recall(one_each),
            "perplexity_change": math.expm1(self.exam.text_loss(few=True) - self.base["few"]),
            "train_s": round(self.train_s, 1),
        }

    def finish(self) -> dict[str, Any]:
        """What is left at the end, of all facts and of the first drop's."""
        held_out = [[(q, f.answer) for q in f.held_out] for f in self.facts]
        trained = [[(q, f.answer) for q in f.asked()] for f in self.facts]
        per_fact = [self.exam.hits(questions) for questions in held_out]
        per_fact_trained = [self.exam.hits(questions) for questions in trained]
        first = slice(0, self.per_drop)
        own = {"seconds": round(self.own_texts_s, 1), "texts": len(self.curriculum.replay.own)}
        self.learner.stop(60)
        self.ledger.close()
        self._folder.cleanup()
        return {
            "trained": _share(per_fact_trained),
            "paraphrases": _share(per_fact),
            "first_drop_trained": _share(per_fact_trained[first]),
            "first_drop_paraphrases": _share(per_fact[first]),
            "perplexity_change": math.expm1(self.exam.text_loss(few=False) - self.base["all"]),
            "control": self.exam.answers(["What is the capital of France?"])[0],
            "own_texts": own,
        }


def _share(hits: Sequence[Sequence[bool]]) -> float:
    flat = [hit for fact in hits for hit in fact]
    return sum(flat) / len(flat)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT.parent / ".demo" / "model")
    parser.add_argument("--world", choices=sorted(WORLDS), default="final")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--drops", type=int, default=10)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting, to tune"
    )
    parser.add_argument("--only", choices=sorted(VARIANTS), action="append")
    parser.add_argument("--results", type=Path, help="where to keep them; none are kept of the tuning world")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = demo_model.build(options.model)
    path = options.results or (RESULTS if options.world == "final" else None)
    texts = dict(setting.split("=", 1) for setting in options.set)
    overrides = {key: configuration.parse(text, tuple(key.split("."))) for key, text in texts.items()}
    facts = WORLDS[options.world].facts(options.facts)
    for name in options.only or VARIANTS:
        done = _read(path)
        if "end" in done.get(name, {}):
            continue
        run = Run(model, facts, options.drops, {**overrides, **VARIANTS[name]})
        settings = run.config.model_dump(mode="json", include={"training", "optimizer", "replay"})
        result: dict[str, Any] = {"settings": settings, "drops": []}
        print(name, overrides, f"own texts: {run.own_texts_s:.1f} s", flush=True)
        for number in range(options.drops):
            result["drops"].append(run.drop(number))
            print(json.dumps(result["drops"][-1]), flush=True)
            _keep(path, name, result)
        result["end"] = run.finish()
        print(json.dumps(result["end"]), flush=True)
        _keep(path, name, result)
    if path is not None:
        show(_read(path), ROOT.parent / "docs" / "forgetting.png" if path == RESULTS else None)


def _read(path: Path | None) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path is not None and path.exists() else {}


def _keep(path: Path | None, name: str, result: dict[str, Any]) -> None:
    """Read again before writing, so that runs may go side by side."""
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        done = {**_read(path), name: result}
        fresh = path.with_suffix(f".{name}.tmp")
        fresh.write_text(json.dumps(done, indent=1) + "\n")
        fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
