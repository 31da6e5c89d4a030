"""The report page and the status screen: what they show, and what they make of hostile names."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from hogwild import svg
from hogwild.errors import HogwildError
from hogwild.examples import parse_line
from hogwild.ledger import GoodLine, Ledger, Pass, Trip
from hogwild.report import page
from hogwild.screen import screen
from hogwild.settings import Config
from support import environment

LINE = b'{"text": "a", "id": "<b>"}'
EVIL = '<script>alert("1")</script>[red]&.jsonl'
EVIDENCE = {"losses": [None], "strikes": [{"loss": None}, {"loss": 31.4159}]}


@pytest.fixture
def config(tmp_path):
    return Config(state_dir=tmp_path / "state", socket=tmp_path / "arena.sock")


def learned(config: Config) -> None:
    """Two files, one of them with an evil name and something in quarantine; and some measurements."""
    with Ledger(config.state_dir / "ledger.sqlite") as ledger:
        for name in ("facts.jsonl", EVIL):
            lines = [
                GoodLine(n, 0, b'{"text": "a", "id": "<b>"}', parse_line(b'{"text": "a", "id": "<b>"}'))
                for n in (1, 2)
            ]
            ledger.accept_file(name, name, lines, passes=2)
        for step in range(1, 9):
            example = (step - 1) % 4 + 1
            ledger.record_passes([Pass(example, 4.0 / step, 3.0 / step, 5, step, 0, "arena")])
            ledger.record_passes(
                [Pass(example, 5.0 / step, None, 5, step, 0, "arena", replay=True)]
            ) if step > 4 else None
            ledger.guards.note(
                step,
                {
                    "probes.own": 0.5 + step / 10,
                    "serving.token_latency_s": 0.02,
                    "training.tokens_per_s": 9.0,
                },
            )
        ledger.guards.set_aside(3, Trip("loss", 8, {"why": EVIL}), f"its loss {EVIL}", EVIDENCE)


def test_the_page_is_self_contained_and_escapes_what_comes_from_outside(config):
    learned(config)
    text = page(config)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>&" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}, (
        "a name, not an address"
    )
    assert not re.search(r"<(img|link|iframe|object|embed|base|form)\b|@import|url\(", text)
    assert "default-src 'none'" in text
    for heading in (
        "Loss before and after, by file",
        "Probes",
        "Update size by layer",
        "Serving while training",
    ):
        assert heading in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert len(re.findall("<svg", text)) >= 5


def test_a_page_of_a_ledger_without_anything_says_so(config):
    with pytest.raises(HogwildError, match="nothing was learned yet"):
        page(config)
    with Ledger(config.state_dir / "ledger.sqlite"):
        pass
    assert page(config).count("nothing yet") >= 5


def test_the_losses_by_file_are_those_of_the_first_and_the_last_pass(config):
    from hogwild.ledger_report import losses_by_file, losses_over_steps, range_of_training

    learned(config)
    with Ledger(config.state_dir / "ledger.sqlite", readonly=True) as ledger:
        (facts, evil) = losses_by_file(ledger, 10)
        assert facts[:2] == ("facts.jsonl", 2)
        assert facts[2] == pytest.approx((4 / 1 + 4 / 2) / 2)
        assert facts[3] == pytest.approx((3 / 5 + 3 / 6) / 2)
        assert evil[0] == EVIL
        assert [step for step, _ in losses_over_steps(ledger)["new"]] == list(range(1, 9))
        assert range_of_training(ledger)[2:] == (8, 60)


def test_curves_have_gaps_where_there_is_no_number():
    drawn = svg.lines([svg.Line("a", [(0, 1), (1, 2), (2, None), (3, 4), (4, 5)])], x="x", y="y")
    assert drawn.count("<polyline") == 2
    assert svg.lines([svg.Line("a", [])], x="x", y="y") == '<p class="none">nothing yet</p>'
    assert "nan" not in svg.lines([svg.Line("a", [(0, float("nan")), (1, 2)])], x="x", y="y").lower()
    assert svg.lines([svg.Line("a", [(5, 3)])], x="x", y="y").count("<circle") == 1


def test_a_curve_of_months_is_drawn_in_little_and_loses_no_peak():
    """One point a minute for 90 days; the server stood still in one of them."""
    points: list[tuple[float, float | None]] = [(minute, 1.0 + minute % 7 / 10) for minute in range(129_600)]
    points[77_777] = (77_777, 50.0)
    points[99_999] = (99_999, 0.1)
    drawn = svg.lines([svg.Line("a", points)], x="minutes", y="ms")
    assert len(drawn) < 100_000
    (line,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert places == sorted(places, key=lambda place: place[0])
    columns = {round(x) for x, _ in places}
    assert len(columns) > 600, "every column of pixels has its part of the curve"
    highest, lowest = min(places, key=lambda place: place[1]), max(places, key=lambda place: place[1])
    assert highest[0] == pytest.approx(places[0][0] + (places[-1][0] - places[0][0]) * 0.6001, abs=2)
    assert lowest[0] == pytest.approx(places[0][0] + (places[-1][0] - places[0][0]) * 0.7716, abs=2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.21), (-3, 1e6), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-9 <= value <= high + (high - low) * 1e-6 for value in found)


def status(**more):
    file = {"name": EVIL, "examples": 3, "pending": 1, "trained": 1, "durable": 1, "quarantined": 0, "undone": 0,
            "failed": 0, "rejected": 2, "accepted_at": "2026-11-25T17:05:00.000Z"}  # fmt: skip
    return {
        "pid": 7, "uptime_s": 3700, "model": "/models/m", "step": 120, "epoch": 15, "training": True, "saved_step": 100,
        "server": {"url": "http://127.0.0.1:8000"}, "pending": 1, "trained": 1, "durable": 1, "quarantined": 0,
        "undone": 0, "failed": 0, "rejected": 2,
        "learning": {"loss": 1.234, "tokens_per_s": 12.5, "updates_per_s": 0.5, "passes_left": 4, "eta_s": 8,
                     "files": [file]},
        "spool": {"files": 2, "oldest_s": 3}, "serving": {"running": 2, "waiting": 1, "token_latency_s": 0.0123},
        "probes": {"newest": {"step": 100, "losses": {"own": 0.5}, "right": {"own": 0.9}},
                   "good": {"generation": 3, "losses": {"own": 0.45}}, "margin": 0.25},
        "checkpoint": {"generation": 3, "saved_at": "2026-11-25T17:00:00Z", "age_s": 65},
        "guards": {"trips": {"probes": 1}, "newest": []}, "memory": {"private_bytes": 2**30, "resident_bytes": 2**31},
        "warnings": ["one example is in quarantine"], **more,
    }  # fmt: skip


@pytest.mark.parametrize("width", [200, 100, 60])
def test_the_screen_says_what_is_learned_how_fast_and_what_is_wrong(width):
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(screen(status()))
    said = console.export_text()
    assert len(said.splitlines()) <= 50, "one screen"
    if width >= 100:
        for part in (
            "training", "12.5 trained tokens/s", "4 passes at most", "generation 3", "own 0.500", "+0.050",
            "probes 1", "12 ms between tokens", "one example is in quarantine", "1 h 1 min", "<script>",
        ):  # fmt: skip
            assert part in said, part


@pytest.mark.parametrize(
    ("width", "left_out"), [(140, set()), (80, {"accepted"}), (60, {"accepted", "undone", "quarantined"})]
)
def test_no_digit_of_what_became_of_a_file_is_cut(width, left_out):
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    shown = status()
    shown["learning"]["files"][0] |= {
        "name": "a" * 60,
        "examples": 123456,
        "pending": 23456,
        "durable": 100000,
    }
    console.print(screen(shown))
    heading, file = (
        re.split(r" {2,}", line.strip("│ "))
        for line in console.export_text().splitlines()
        if line.startswith(("│  file ", "│  aaa"))
    )
    row = dict(zip(heading, file, strict=True))
    assert {key: row.get(key) for key in ("examples", "pending", "trained", "durable", "bad")} == {
        "examples": "123456", "pending": "23456", "trained": "1", "durable": "100000", "bad": "2",
    }  # fmt: skip
    assert left_out == {"accepted", "undone", "quarantined"} - set(row)


def test_names_of_files_cannot_speak_to_the_terminal():
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    shown = status(warnings=["\x1b[2Jb in incoming/ is not taken"])
    shown["learning"]["files"][0]["name"] = "\x1b[2Ja.jsonl"
    console.print(screen(shown))
    said = console.export_text()
    assert "\x1b" not in said
    assert r"\x1b[2Ja.jsonl" in said
    assert r"! \x1b[2Jb" in said


@pytest.mark.parametrize("more", [{}, {"learning": None}], ids=["trains", "waits"])
def test_what_was_said_long_ago_is_not_shown_as_what_is(more):
    """`status.json` cannot be written on a full disk."""

    def said(ago: float) -> str:
        console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
        shown = {**status(), "at": time.time() - ago}
        if more:
            del shown["learning"]
        console.print(screen(shown))
        return console.export_text().splitlines()[0]

    assert "process 7, as of 1 h 1 min ago" in said(3660.5)
    assert "as of" not in said(5.0)


def test_a_probe_that_is_no_number_is_shown_as_that():
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    probes = {**status()["probes"], "newest": {"step": 1, "losses": {"own": None}, "right": {"own": 0.0}}}
    console.print(screen(status(probes=probes, training=False, warnings=[])))
    said = console.export_text()
    assert "not a number" in said
    assert "not training" in said


@pytest.fixture
def hogwild(config):
    """From the command line, without a daemon."""

    def run(*arguments: str, code: int = 0) -> str:
        env = environment(HOGWILD_STATE_DIR=str(config.state_dir), NO_COLOR="1")
        env.pop("COLUMNS", None)
        command = [sys.executable, "-m", "hogwild", *arguments]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert ran.returncode == code, ran.stderr
        return ran.stdout + ran.stderr

    return run


def test_quarantine_says_what_was_measured(config, hogwild):
    """Of the probes, what they were and what they became; of the example, its loss at first and at last."""
    learned(config)
    with Ledger(config.state_dir / "ledger.sqlite") as ledger:
        fallen = {
            "own": {"was": 0.45, "is": 1.8125, "margin": 0.25},
            "file": {"was": 2.0, "is": None, "margin": 0.25},
        }
        ledger.roll_back(0, retrain=False, trip=Trip("probes", 8, fallen), generation=0)
    shown = hogwild("quarantine", "1")
    assert "own 0.450 -> 1.812 (0.25 allowed), file 2.000 -> not a number (0.25 allowed)" in shown
    assert "its loss 4.00 -> 0.60" in shown
    assert "its loss 1.33 -> 0.43" in hogwild("quarantine", "3"), "what only its own loss speaks against"
    (one,) = json.loads(hogwild("quarantine", "1", "--json"))
    assert (one["step"], one["measured"]) == (8, fallen)
    assert (one["first_loss"], one["last_loss"]) == (4.0, 0.6)


def test_quarantine_lists_what_is_set_aside_and_lets_it_out(config, hogwild):
    learned(config)
    shown = hogwild("quarantine")
    assert EVIL in shown, "in a pipe nothing is cut"
    _heading, row = shown.splitlines()
    assert len(row) > 80
    assert "its loss 1.33 -> 0.43; its loss when it was refused: not a number, 31.42" in shown
    (one,) = json.loads(hogwild("quarantine", "--json"))
    assert (one["example_id"], one["file"], one["about"]) == (3, EVIL, EVIDENCE)
    assert json.loads(hogwild("quarantine", "--retrain", "--file", "facts.jsonl", "--json")) == {
        "examples": 0
    }
    assert "nothing of that" in hogwild("quarantine", "--retrain", "--file", "facts.jsonl", code=1)
    assert "the one example in quarantine is another one" in hogwild("quarantine", "--file", "facts.jsonl")
    assert json.loads(hogwild("quarantine", "3", "--retrain", "--json")) == {"examples": 1}
    assert "nothing" in hogwild("quarantine")
    with Ledger(config.state_dir / "ledger.sqlite", readonly=True) as ledger:
        assert 3 in {pending.example_id for pending in ledger.pending(9)}
