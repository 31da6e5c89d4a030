import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hogwild.log_json import MAX_LINE_BYTES, to_line

SCRIPT = """
import logging, threading, warnings
from hogwild import log

log.get("early").info("before.configure")  # must not break what follows
noisy = logging.getLogger("library")
noisy.addHandler(logging.StreamHandler()); noisy.propagate = False
log.configure("info", FORMAT)
logger = log.get("hogwild.test")
logger.info("spool.accepted", file="a.jsonl", examples=3)
logger.debug("not.written")
noisy.warning("%d things", 3)
noisy.info("not written")
logging.getLogger("broken").error("%d", "x")
logging.getLogger("odd").log(35, "between levels")
warnings.warn("careful", DeprecationWarning, stacklevel=1)
try:
    {}["key"]
except KeyError:
    logger.exception("work.failed", step=4)
def die():
    raise RuntimeError("thread dies")
thread = threading.Thread(target=die, name="trainer-1"); thread.start(); thread.join()
class Finalized:
    def __del__(self): raise OSError("in del")
del (x := Finalized())
log.configure("debug", FORMAT)
logger.debug("now.written")
raise ValueError("main dies")
"""


def run(format: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.replace("FORMAT", repr(format)).replace(
        "del (x := Finalized())", "x = Finalized(); del x"
    )
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def spoken() -> list[dict]:
    result = run("json")
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("{"))
    return [json.loads(line) for line in lines[start:]]


def of(spoken: list[dict], event: str) -> list[dict]:
    return [line for line in spoken if line["event"] == event]


def test_an_event_is_one_object_with_time_level_and_its_fields(spoken):
    line = of(spoken, "spool.accepted")[0]
    assert line["timestamp"].endswith("Z")
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["level"], line["logger"], line["file"], line["examples"]) == (
        "info",
        "hogwild.test",
        "a.jsonl",
        3,
    )


def test_the_level_holds_and_can_change_for_loggers_that_exist(spoken):
    assert not of(spoken, "not.written")
    assert of(spoken, "now.written")


def test_libraries_speak_json_even_those_with_handlers_of_their_own(spoken):
    messages = {line["message"]: line for line in of(spoken, "python.log")}
    assert messages["3 things"]["logger"] == "library"
    assert "not written" not in messages
    assert any("cannot be formatted" in message for message in messages)
    assert messages["between levels"]["level"] == "warning"


def test_warnings_are_events(spoken):
    assert [line["category"] for line in of(spoken, "python.warning")] == ["DeprecationWarning"]


def test_tracebacks_are_structured(spoken):
    exception = of(spoken, "work.failed")[0]["exception"][0]
    assert exception["exc_type"] == "KeyError"
    assert exception["frames"][-1]["name"] == "<module>"


def test_uncaught_exceptions_of_main_threads_and_finalizers_are_events(spoken):
    lines = {line["exception"][0]["exc_value"]: line for line in of(spoken, "python.uncaught")}
    assert lines["thread dies"]["thread"] == "trainer-1"
    assert lines["main dies"]["level"] == "critical"
    assert "in del" in lines


def test_what_a_line_calls_itself_cannot_speak_to_the_terminal():
    script = (
        "from hogwild import log\nlog.configure('info', 'console')\n"
        r"log.get('x').info('example.trained', id='\x1b[2J', file='\x1b]0;a\x07b')"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in out
    assert r"id=\x1b[2J" in out
    assert r"file=\x1b]0;a\x07b" in out


def test_the_console_form_is_for_people():
    out = run("console").stdout
    assert "spool.accepted" in out
    assert "examples=3" in out
    assert "ValueError: main dies" in out


def test_a_closed_pipe_does_not_raise():
    script = """
import sys
from hogwild import log
log.configure("info", "json")
sys.stdin.readline()
for _ in range(1000):
    log.get("x").info("still.alive", text="x" * 1000)
sys.stderr.write("survived")
sys.stderr.flush()
import os; os._exit(0)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, stderr=-1, text=True)
    child.stdout.close()
    child.stdin.write("go\n")
    child.stdin.flush()
    assert child.stderr.read() == "survived"
    assert child.wait(60) == 0
    child.stdin.close()
    child.stderr.close()


STUCK = """
import io, os, threading
from hogwild import log

inside = threading.Event()

class Stuck(io.RawIOBase):
    def writable(self): return True
    def fileno(self): return 1
    def write(self, data):
        inside.set()
        threading.Event().wait()

log.configure("info", "json", io.TextIOWrapper(io.BufferedWriter(Stuck())))
threading.Thread(target=log.get("trainer").info, args=("example.pass",), daemon=True).start()
inside.wait()
log.get("watchdog").error("thread.hangs", thread="trainer-0")
for _ in range(100):
    log.get("loop").info("still.alive")
os._exit(0)
"""


def test_a_thread_that_hangs_while_it_writes_neither_silences_the_others_nor_holds_them_up():
    """With a wait for each line this would take more than three minutes."""
    ran = subprocess.run([sys.executable, "-c", STUCK], check=True, capture_output=True, timeout=100)
    events = [json.loads(line)["event"] for line in ran.stdout.splitlines()]
    assert events == ["thread.hangs", *["still.alive"] * 100]


def test_numbers_of_every_kind_survive():
    import numpy as np

    line = json.loads(
        to_line(
            {
                "event": "e",
                "f32": np.float32(1.5),
                "i": np.int64(3),
                "yes": np.bool_(True),
                "nan": np.float32("nan"),
                "plain": float("nan"),
                "inf": [float("-inf")],
                "big": 2**70,
            }
        )
    )
    assert line == {
        "event": "e",
        "f32": 1.5,
        "i": 3,
        "yes": True,
        "nan": "nan",
        "plain": "nan",
        "inf": ["-inf"],
        "big": 2**70,
    }


def test_objects_become_text_and_hostile_ones_do_not_raise():
    class Hostile:
        def __str__(self):
            raise RuntimeError

    loop: list = []
    loop.append(loop)
    line = json.loads(
        to_line(
            {
                "path": Path("/x"),
                "error": ValueError("why"),
                "hostile": Hostile(),
                "loop": loop,
                "half": "\ud800",
            }
        )
    )
    assert (line["path"], line["error"], line["half"]) == ("/x", "why", "\ud800")
    assert "Hostile" in line["hostile"]


@pytest.mark.parametrize(
    "value",
    [
        "é" * 100_000,
        ["x" * 1000] * 1000,
        {str(i): "x" * 1000 for i in range(1000)},
        {"k" * 100_000: 1},
        [[1] * 300] * 300,
    ],
    ids=["text", "list", "mapping", "key", "numbers"],
)
def test_a_long_line_is_cut_to_what_journald_takes(value):
    line = to_line({"timestamp": "t", "level": "info", "event": "e", "step": 3, "value": value})
    assert len(line) <= MAX_LINE_BYTES
    parsed = json.loads(line)
    assert (parsed["event"], parsed["truncated"]) == ("e", True)


def test_many_long_fields_keep_the_event():
    line = to_line({"event": "e", **{f"{'k' * 100}{i}": "x" * 60 for i in range(1000)}})
    assert len(line) <= MAX_LINE_BYTES
    assert json.loads(line)["event"] == "e"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.characters(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), anything))
def test_anything_becomes_one_line_of_json(fields):
    line = to_line(fields)
    assert b"\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
