"""An example that ends the daemon: after every restart it comes first again, until it is set aside. Real kills."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hogwild.errors import LedgerError
from hogwild.ledger import Ledger
from hogwild.one_shot import OneShot
from hogwild.settings import Config
from hogwild.train_command import _interrupting
from hogwild.trainer import Trainer
from studio import Studio, model
from support import wait_until
from tiny import Child

POISON = "w58"
STRIKES, KILLS = 3, 9
"""Refusals or errors after which an example is set aside; kills, which may come from anywhere."""


def daemon(pipe: Any, root: Path, dies: str, settings: dict[str, Any]) -> None:
    """One life of a daemon that ends by `dies` where a step has the poison in it."""
    studio = Studio(root, probes__own=0, replay__self_texts=0, **settings)
    learner = studio.learner
    poison = learner.encoder.tokenizer.convert_tokens_to_ids(POISON)
    for trainer in learner.trainers:

        def step(items: Any, real: Any = trainer.step) -> Any:
            if any(poison in item.encoded.ids for item in items):
                if dies == "exception":
                    raise RuntimeError("poison")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(items)

        trainer.step = step  # type: ignore[method-assign]
    pipe.send(("alive", None))
    studio.train()
    studio.close()
    pipe.send(("idle", studio.learner.turn.recent))


def lives(root: Path, dies: str, **settings: Any) -> int:
    """Starts it again and again, until one life has nothing left to train; how many there were."""
    for life in range(1, 15):
        child = Child(daemon, root, dies, settings)
        child.hear("alive")
        child.process.join()
        if child.process.exitcode == 0:
            return life
        assert child.process.exitcode == (1 if dies == "exception" else -signal.SIGKILL)
    raise AssertionError("it dies for ever")


def accept(root: Path, lines: list[bytes], **settings: Any) -> None:
    model(root / "model")
    studio = Studio(root, probes__own=0, replay__self_texts=0, **settings)
    studio.accept("a.jsonl", lines)
    studio.close()


def line(*words: int) -> bytes:
    return f'{{"text": "{" ".join(f"w{word}" for word in words)}"}}'.encode()


@pytest.mark.parametrize("dies", ["kill", "exception"])
@pytest.mark.parametrize("settings", [{}, {"training__threads": 2, "training__step_tokens": 200}])
def test_what_kills_the_daemon_is_set_aside_and_only_that(tmp_path, dies, settings):
    """Whoever was trained beside it, in its step or by another thread, is trained."""
    accept(tmp_path, [line(i, i + 1, 58 if i == 3 else 57, i) for i in range(8)], **settings)
    assert lives(tmp_path, dies, **settings) <= (KILLS if dies == "kill" else STRIKES) + 1
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        (suspect,) = ledger.guards.suspects()
        assert (suspect.guard, suspect.line_no) == ("crash", 4)
        assert len(suspect.about["strikes"]) == KILLS, "an error counts as often"
        assert ("poison" in suspect.reason) == (dies == "exception")
        assert ledger.counts().trained == 7
        (error,) = [line for _, _, line in ledger.errors("a.jsonl")]
        assert "ended" in error.reason
        assert ledger.errors_due()


def test_what_kills_the_daemon_only_once_it_is_replayed_is_found_too(tmp_path):
    """The poison has been learned: it comes beside new examples, of which none is to blame."""
    accept(tmp_path, [line(1, 58, 3), line(4, 5, 6)], training__passes=1)
    studio = Studio(tmp_path, probes__own=0, replay__self_texts=0)
    studio.train()
    studio.save()
    studio.accept("b.jsonl", [line(i, i + 1, i + 2) for i in range(10, 30)])
    studio.close()
    lives(tmp_path, "kill")
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        (suspect,) = ledger.guards.suspects()
        assert (suspect.guard, suspect.file, suspect.line_no) == ("crash", "a.jsonl", 1)
        assert ledger.counts().pending == 0
        assert ledger.guards.release([suspect.example_id]) == 1
        assert [one.crashes for one in ledger.pending(9)] == [0]


def test_a_kill_that_is_nobodys_fault_leaves_nothing(tmp_path):
    """One kill in mid-step, twice over, and then it is trained: no strike is left to add to later ones."""
    accept(tmp_path, [line(1, 58, 3), line(4, 5, 6)])
    for _ in range(2):
        child = Child(daemon, tmp_path, "kill", {})
        child.process.join()
        assert child.process.exitcode == -signal.SIGKILL
    studio = Studio(tmp_path, probes__own=0, replay__self_texts=0)
    assert max(one.crashes for one in studio.ledger.pending(9)) == 2
    studio.train()
    studio.close()
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        assert ledger.counts().trained == 2
        with ledger._db.read() as db:
            assert db.execute("SELECT * FROM strikes").fetchall() == []


def test_strikes_of_other_guards_are_counted_over_restarts(tmp_path):
    """Killed after each refusal: without a memory it would be tried for ever."""
    accept(tmp_path, [line(1, 2, 3)], training__passes=1)

    for life in range(1, STRIKES + 1):
        child = Child(refusing, tmp_path)
        child.process.join()
        assert child.process.exitcode == (0 if life == STRIKES else -signal.SIGKILL)
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        (suspect,) = ledger.guards.suspects()
        assert suspect.guard == "loss"
        assert len(suspect.about["strikes"]) == STRIKES


def refusing(_pipe: Any, root: Path) -> None:
    """A daemon that refuses the loss of every example, and is killed before it tries the next."""
    studio = Studio(root, probes__own=0, replay__self_texts=0)
    studio.learner.trainers[0]._max_loss = 1e-6
    done = studio.curriculum.done

    def killed(batch: Any) -> None:
        done(batch)
        if not studio.ledger.guards.suspects():
            os.kill(os.getpid(), signal.SIGKILL)

    studio.curriculum.done = killed  # type: ignore[method-assign]
    studio.train()
    studio.close()


def test_a_ledger_that_cannot_be_written_speaks_against_no_example(tmp_path, capsys):
    """Its disk is full after each step: the daemon ends as often as would set the example aside."""
    accept(tmp_path, [line(1, 2, 3)])
    for _ in range(STRIKES):
        studio = Studio(tmp_path, probes__own=0, replay__self_texts=0)
        with studio.ledger._db.write(fsync=False) as db:
            db.execute(
                "CREATE TEMP TRIGGER full BEFORE INSERT ON passes BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
            )
        studio.learner.start()
        wait_until(lambda learner=studio.learner: learner.failure is not None, "the trainer ends")
        assert isinstance(studio.learner.failure, LedgerError)
        assert "trainer.died" not in capsys.readouterr().out, "whose traceback would be reported as a bug"
        studio.learner.stop(60)
        assert [one.crashes for one in studio.ledger.pending(9)] == [0]
        studio.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_whoever_gives_up_hogwild_train_speaks_against_nobody(tmp_path, first, second):
    """Twice Ctrl-C or TERM while an example is trained, as often as would set it aside."""
    model(tmp_path / "model")
    (tmp_path / "a.jsonl").write_bytes(line(1, 2, 3) + b"\n")
    for _ in range(STRIKES):
        child = Child(given_up, tmp_path)
        child.hear("in a step")
        os.kill(child.pid, first)
        child.hear("interrupted")
        if second == signal.SIGTERM:
            time.sleep(1.1)  # sooner, it is taken for the same
        os.kill(child.pid, second)
        child.process.join(60)
        assert child.process.exitcode == 1
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        assert [one.crashes for one in ledger.pending(9)] == [0]


def given_up(pipe: Any, root: Path) -> None:
    """`hogwild train` whose first step never ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    shot = OneShot(
        Config.model_validate({"replay": {"self_texts": 0}}), root / "model", root / "out", root / "state"
    )

    def step(*_: Any) -> None:
        pipe.send(("in a step", None))
        threading.Event().wait()

    def interrupt() -> None:
        shot.interrupt()
        pipe.send(("interrupted", None))

    Trainer.step = step  # type: ignore[method-assign]
    with _interrupting(interrupt, Console(stderr=True)):
        shot.run([root / "a.jsonl"])


def test_a_step_that_outlasts_the_end_of_the_daemon_is_nobodys_fault(tmp_path):
    """It is told to end, waits as long as it may, and goes."""
    accept(tmp_path, [line(1, 58, 3)])
    studio = Studio(tmp_path, probes__own=0, replay__self_texts=0)
    begun, goes_on = threading.Event(), threading.Event()
    for trainer in studio.learner.trainers:

        def step(items: Any, real: Any = trainer.step) -> Any:
            begun.set()
            goes_on.wait()
            return real(items)

        trainer.step = step  # type: ignore[method-assign]
    studio.learner.start()
    assert begun.wait(60)
    assert [one.crashes for one in studio.ledger.pending(9)] == [1], "so a kill would count"
    assert not studio.learner.stop(0.1)
    assert [one.crashes for one in studio.ledger.pending(9)] == [0]
    goes_on.set()
    studio.close()
