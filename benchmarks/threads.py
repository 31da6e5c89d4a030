"""Does the service learn as well with several lock-free trainer threads as with one? The real trainer on a real model.

    python benchmarks/threads.py        benchmarks/results/threads.json, and a table

`hogwild train` with the shipped configuration (`config/hogwild.toml`: lr 2e-4, replay of own texts, protection), on ten
invented facts of four lines each, with 1, 2 and 4 threads, three seeds. The same lines, as often each, for every run.
Staleness of a step: the steps that other threads finished between its first read of the weights and its last write.
Losses are mean nats a token: of the trained lines, of the trained answers to questions that were worded otherwise, and
of other text. CPU, SmolLM2-135M; finished runs are kept.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from forgetting_facts import TUNING, Fact
from forgetting_measure import Exam
from hogwild import demo_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "threads.json"
THREADS, SEEDS, FACTS = (1, 2, 4), (0, 1, 2), 10
COLUMNS = {"trained": "trained lines", "reworded": "other wordings", "text": "other text"}


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    model = demo_model.build(ROOT / ".demo" / "model")
    facts = TUNING.facts(FACTS)
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "0|0" not in done:
        done["0|0"] = judge(model, facts)
    for seed in SEEDS:
        for threads in THREADS:
            if (key := f"{threads}|{seed}") not in done:
                done[key] = train(model, facts, threads, seed)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.with_suffix(".tmp").write_text(json.dumps(done, indent=1) + "\n")
                RESULTS.with_suffix(".tmp").replace(RESULTS)
                print(key, done[key], flush=True)
    show(done)


def train(model: Path, facts: list[Fact], threads: int, seed: int) -> dict[str, float]:
    """One run of `hogwild train` in a process of its own, and what its model knows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [line for i, fact in enumerate(facts) for line in fact.lines(str(i))]
        (folder / "facts.jsonl").write_text("\n".join(lines) + "\n")
        ran = subprocess.run(
            [
                sys.executable, "-m", "hogwild", "train", folder / "facts.jsonl", "--model", model,
                "--out", folder / "out", "--threads", str(threads), "--json",
            ],
            env={
                **os.environ, "HOGWILD_TRAINING__SEED": str(seed),
                "HOGWILD_LOG__LEVEL": "debug", "HOGWILD_LOG__FORMAT": "json",
            },
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        events = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{")]
        staleness = [event["staleness"] for event in events if "staleness" in event]
        result = json.loads(ran.stdout)
        if result["passes"] != 3 * len(lines) or result["interrupted"]:
            sys.exit(f"not everything was trained: {result}")
        known = judge(folder / "out", facts)
        shutil.rmtree(folder / "out")
    return {
        "trained": result["files"][0]["loss_after"],
        **known,
        "staleness": statistics.fmean(staleness),
        "stalest": max(staleness),
        "steps": result["steps"],
        "seconds": result["seconds"],
    }


@torch.no_grad()
def judge(folder: Path, facts: list[Fact]) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = [
        answer_loss(model, tokenizer, question, fact.trained[0][1])
        for fact in facts
        for question in fact.held_out
    ]
    return {"reworded": statistics.fmean(losses), "text": Exam(model, tokenizer).text_loss(few=False)}


def answer_loss(model: PreTrainedModel, tokenizer: Any, question: str, answer: str) -> float:
    """Mean nats a token of `answer` after `question`, in the model's chat template."""
    asked = [{"role": "user", "content": question}]
    start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = [*start, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor([whole])
    logits = model(ids[:, :-1]).logits[0, len(start) - 1 :].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(start) :]))


def show(done: dict[str, Any]) -> None:
    base = done["0|0"]
    names = " | ".join(f"{name}: loss; above one thread, by seed" for name in COLUMNS.values())
    print(
        f"\n| threads | {names} | staleness: mean, max | steps | seconds, over one thread |\n"
        "|---|---|---|---|---|---|---|"
    )
    print(f"| untrained | | {base['reworded']:.4f} | {base['text']:.4f} | | | |")
    for threads in THREADS:
        runs, one = ([done[f"{count}|{seed}"] for seed in SEEDS] for count in (threads, 1))
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            cell = f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
            if threads > 1:
                above = [f"{a[column] - b[column]:+.4f}" for a, b in zip(runs, one, strict=True)]
                cell += f"; {', '.join(above)}"
            cells.append(cell)
        stale = (
            f"{statistics.fmean(run['staleness'] for run in runs):.2f}, {max(run['stalest'] for run in runs)}"
        )
        steps = statistics.fmean(run["steps"] for run in runs)
        seconds = statistics.fmean(run["seconds"] for run in runs) / statistics.fmean(
            run["seconds"] for run in one
        )
        print(f"| {threads} | {' | '.join(cells)} | {stale} | {steps:.0f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
