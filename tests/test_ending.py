"""A command that is done while one of its threads is in torch ends as it would without that thread."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import environment

BESIDE = """
import atexit, sys, threading
from hogwild.cli import app, main

{commands}
if {at_work}:
    import torch

    def work():
        matrix = torch.ones(64, 64)
        while True:
            begun.set() if len(matrix.mm(matrix)) else None

    begun = threading.Event()
    threading.Thread(target=work, daemon=True).start()
    begun.wait()
sys.argv = ["hogwild", *{arguments!r}]
main()
"""
COMMANDS = """
@app.command()
def fails():
    raise RuntimeError("that was unexpected")

@app.command()
def says():
    atexit.register(print, "at the very end")
"""


def ended(at_work: bool, arguments: list[str], **kwargs: Any) -> Any:
    script = BESIDE.format(at_work=at_work, arguments=arguments, commands=COMMANDS)
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment(COLUMNS="200", NO_COLOR="1", PYTHONUNBUFFERED=""),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **{"stdout": subprocess.PIPE, **kwargs},
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["version"], 0),
        (["says"], 0),
        (["train", "/nowhere.jsonl", "--model", "/nowhere", "--out", "/nowhere/out"], 2),
        (["versoin"], 2),
        (["fails"], 1),
    ],
)
def test_a_thread_that_is_at_work_changes_nothing(arguments, code):
    alone, beside = ended(False, arguments), ended(True, arguments)
    assert alone.returncode == beside.returncode == code
    assert beside.stdout == alone.stdout
    assert beside.stderr == alone.stderr
    assert alone.stdout or alone.stderr


def test_what_could_not_be_written_is_a_failure():
    with Path("/dev/full").open("w") as full:
        alone, beside = (ended(at_work, ["says"], stdout=full) for at_work in (False, True))
    assert alone.returncode == beside.returncode == 120
