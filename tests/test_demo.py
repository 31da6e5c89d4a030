"""What `hogwild demo` does around the daemon and the server, which `make demo` really starts."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hogwild import demo
from hogwild.demo import Demo


@pytest.fixture
def show(tmp_path: Path) -> Demo:
    one = Demo(tmp_path, tmp_path / "model", Console(file=io.StringIO(), width=200))
    one.run_dir.mkdir()
    return one


def test_an_answer_may_hold_what_rich_takes_for_markup(show: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the Mistral family write [/INST]."""

    def answers(items: list[dict[str, Any]]) -> list[str]:
        return [f"[/INST] [1] {item['answer']}" for item in items]

    show.server = SimpleNamespace(pid=1, poll=lambda: None)  # type: ignore[assignment]
    for name, what in {
        "_start": lambda: None, "_drop": lambda: None, "_watch": lambda _answered: 0.0, "_events": lambda: iter(()),
        "_ask_all": answers,
    }.items():  # fmt: skip
        monkeypatch.setattr(show, name, what)
    assert show._learn()
    said = show.console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("[/INST] [1] ") == 1 + 4 + len(show.questions["paraphrases"])


def test_what_the_environment_says_of_another_daemon_is_not_for_the_demo(
    show: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its state folder, the demo's model would become the one that it has learned on."""
    monkeypatch.setenv("HOGWILD_STATE_DIR", "/srv/hogwild")
    monkeypatch.setenv("HOGWILD_LOG__FORMAT", "console")
    given: list[dict[str, str]] = []
    monkeypatch.setattr(demo, "_spawn", lambda _command, environment, _out: given.append(environment))
    monkeypatch.setattr(show, "_wait_for", lambda *_: None)
    show._start()
    assert [{key for key in one if key.startswith("HOGWILD_")} for one in given] == [{"HOGWILD_CONFIG"}] * 2
    assert given[0]["PATH"] == os.environ["PATH"]
