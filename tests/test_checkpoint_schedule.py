"""When a checkpoint is due, and how many steps no checkpoint holds. Everything of the daemon, a tiny model."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hogwild.arena.client import Arena
from hogwild.attachment import Attachment
from hogwild.checkpoint_schedule import CheckpointSchedule
from hogwild.commands import Command
from hogwild.curriculum import Curriculum
from hogwild.going_back import GoingBack
from hogwild.keeper import Keeper
from hogwild.ledger import Ledger
from studio import Studio, model
from support import wait_until

QUIET = {"replay__self_texts": 0, "probes__own": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def studio(root: Path) -> Iterator[Studio]:
    """With generations 1 and 2, of 4 and 8 steps."""
    studio = Studio(root, **QUIET)
    for name in ("a", "b"):
        studio.drop(name, 2)
        studio.train()
        studio.save()
    yield studio
    if studio.ledger._db.is_open:
        studio.close()


def restarted(studio: Studio, arena: Arena) -> tuple[CheckpointSchedule, Attachment]:
    """A daemon that finds the state folder of an earlier one, and takes this arena."""
    studio.ledger = Ledger(studio.config.state_dir / "ledger.sqlite")
    studio.keeper = Keeper(studio.config)
    schedule = CheckpointSchedule(studio.config, studio.ledger, studio.keeper)
    curriculum = Curriculum(studio.ledger, studio.config.replay, seed=0)
    attachment = Attachment(studio.config, studio.ledger, studio.keeper, curriculum, schedule)
    attachment.offered(arena)
    assert attachment.learner is not None
    studio.learner = attachment.learner
    return schedule, attachment


def test_the_servers_key_is_in_no_checkpoint(root):
    """docs/operations.md has it put into `server.arguments`; a checkpoint is read by others, and given away."""
    studio = Studio(root, server__arguments=["--api-key", "hunter2"], **QUIET)
    schedule = CheckpointSchedule(studio.config, studio.ledger, studio.keeper)
    studio.drop("a", 2)
    studio.train()
    assert schedule.save(studio.learner)
    studio.keeper.history.record()
    studio.close()
    written = [path for path in studio.config.state_dir.rglob("*") if path.is_file()]
    assert len([path for path in written if path.name == "state.json"]) >= 2
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_the_ledger_is_not_asked_again_and_again_while_nothing_trains(root):
    studio = Studio(root, checkpoint__interval_s=1.0, **QUIET)
    schedule = CheckpointSchedule(studio.config, studio.ledger, studio.keeper)
    schedule.starts_from(studio.learner.progress.steps)
    schedule._tried_at -= 3600  # the interval is long over
    asked: list[str] = []
    connection = studio.ledger._db._db
    assert connection is not None
    connection.set_trace_callback(asked.append)
    for _ in range(20):
        assert not schedule.due(studio.learner)
    connection.set_trace_callback(None)
    assert len(asked) <= 5, "once an interval, in however many turns"

    studio.drop("a", 1)
    studio.train(1)
    wait_until(lambda: schedule.due(studio.learner), "what is trained after that is saved as before")
    studio.close()


@pytest.mark.parametrize("generation", [0, 1])
def test_steps_since_the_checkpoint_count_from_the_rollback_after_a_restart_too(studio, generation):
    """The counter only grows, and is ahead of the generation that was gone back to."""
    studio.roll_back(generation)
    weights = studio.bits()
    for _ in range(2):
        schedule, _ = restarted(studio, studio.close())
        assert studio.learner.progress.steps == 8
        assert studio.bits() == weights
        assert schedule.saved_step == 8
        assert not schedule.unsaved(studio.learner), "the checkpoint holds these very weights"
    studio.ledger.retrain()
    studio.learner.curriculum.wake()
    studio.train(2)
    trained = studio.learner.progress.steps - 8
    assert trained
    schedule, _ = restarted(studio, studio.close())
    assert studio.learner.progress.steps - schedule.saved_step == trained
    assert schedule.unsaved(studio.learner)
    studio.save()
    schedule, _ = restarted(studio, studio.close())
    assert studio.learner.progress.steps - schedule.saved_step == 0


def test_weights_that_are_written_anew_from_the_model_are_no_steps_to_save(root):
    """A crash before the first checkpoint leaves an arena that is not trusted: everything is trained again."""
    studio = Studio(root, **QUIET)
    studio.drop("a", 2)
    studio.train()
    crashed = studio.arena.control.rewriting()
    crashed.__enter__()
    schedule, _ = restarted(studio, studio.close())
    assert studio.learner.progress.steps == 4
    assert studio.learner.progress.steps - schedule.saved_step == 0
    assert not schedule.unsaved(studio.learner)


def test_what_is_trained_as_soon_as_a_rollback_is_done_is_not_taken_for_saved(studio, monkeypatch):
    schedule, attachment = restarted(studio, studio.close())
    back = GoingBack(studio.ledger, studio.keeper, schedule, attachment)
    studio.learner.start()
    start = studio.learner.start

    def start_and_train() -> None:
        start()
        wait_until(lambda: studio.ledger.is_idle(), "everything is trained before the rollback has returned")

    monkeypatch.setattr(studio.learner, "start", start_and_train)
    command = Command("rollback", {"generation": 1, "retrain": True})
    back.on_command(command)
    assert command.wait()["examples_reopened"] == 2
    assert studio.learner.progress.steps > 8
    assert schedule.saved_step == 8


def test_a_checkpoint_that_cannot_be_written_says_so_and_what_mends_it_until_one_is(studio, root):
    """The model's folder is not there: its tokenizer and configuration belong into every checkpoint."""
    schedule = CheckpointSchedule(studio.config, studio.ledger, studio.keeper)
    studio.drop("c", 2)
    studio.train()
    away = (root / "model").rename(root / "away")
    assert not schedule.save(studio.learner)
    assert "generation-00000003 could not be written" in schedule.unwritten
    assert f"bring back, or let user {os.geteuid()} read, {root / 'model'}" in schedule.unwritten
    away.rename(root / "model")
    assert schedule.save(studio.learner)
    assert schedule.unwritten == ""


def test_history_that_cannot_be_written_says_so_until_it_can(studio, root):
    studio.drop("c", 2)
    studio.train()
    history = root / "state" / "history"
    away = history.rename(root / "history-away")
    history.write_text("a file where the folder was")
    studio.save()
    assert str(history) in studio.keeper.unrecorded
    history.unlink()
    away.rename(history)
    studio.keeper.tidy()
    assert studio.keeper.unrecorded == ""
