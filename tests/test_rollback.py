"""Rollback of live weights on a tiny model: exact, booked in the ledger, and finished wherever it is killed."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from hogwild import generation, metrics, rollback
from hogwild.arena.client import Arena
from hogwild.checkpoint import Checkpoints
from hogwild.errors import CheckpointError
from hogwild.history import History
from hogwild.keeper import Keeper
from hogwild.ledger import Pass
from hogwild.weights import read_tensors
from studio import Studio, model
from tiny import Child


@pytest.fixture
def root(tmp_path: Path) -> Path:
    model(tmp_path / "model")
    return tmp_path


def story(studio: Studio) -> dict[int, dict[str, bytes]]:
    """Three files, a generation after each; what every generation was, and 0."""
    versions = {0: studio.bits()}
    for number, name in enumerate(("a", "b", "c"), 1):
        studio.drop(name, 4)
        studio.train()
        assert studio.save() == number
        versions[number] = studio.bits()
    assert len({json.dumps(sorted((k, hash(v)) for k, v in bits.items())) for bits in versions.values()}) == 4
    return versions


def test_weights_and_moments_are_those_that_were_saved_bit_for_bit(root):
    studio = Studio(root)
    versions = story(studio)
    control = studio.arena.control
    studio.drop("unsaved", 2)
    studio.train()
    for target in (2, 3, 1, 0, 3):
        steps, epoch = control.steps, control.epoch
        done = studio.roll_back(target)
        assert studio.bits() == versions[target]
        assert (done["generation"], done["live"]) == (target, True)
        assert control.generation == target == studio.keeper.checkpoints.current_generation()
        assert control.steps == steps, "steps never go backwards"
        assert control.epoch >= epoch + 2, "answers from before, from the middle and from after differ by it"
        assert rollback.pending(studio.ledger) is None
    studio.close()


def test_the_probes_that_are_shown_are_those_of_the_weights_that_came_back(root):
    """Not those of the weights that were gone back from: who goes back because of them looks there."""
    studio = Studio(root, probes__margin=50)
    judge = studio.learner.judge
    assert studio.learner.wait_for_own_texts(60)
    judge.begin()
    scores = {0: judge.score()}
    for number, name in enumerate(("a", "b"), 1):
        studio.drop(name, 4)
        studio.train()
        studio.save()
        scores[number] = judge.score()
    assert scores[0].losses != scores[1].losses != scores[2].losses
    studio.drop("unsaved", 2)
    studio.train()
    judge.score()
    for target in (1, 0, 2):
        studio.roll_back(target)
        shown = judge.probes.newest
        assert shown.losses == pytest.approx(scores[target].losses, abs=1e-4)
        assert shown.right == pytest.approx(scores[target].right, abs=1e-4)
        assert judge.score().losses == pytest.approx(shown.losses, abs=1e-4), "they are what is measured"
    page = generate_latest(metrics.REGISTRY).decode()
    assert f'hogwild_probe_loss_nats{{probes="own"}} {judge.probes.newest.losses["own"]}' in page
    studio.close()


def test_the_ledger_says_what_the_weights_hold(root):
    studio = Studio(root)
    story(studio)
    studio.drop("unsaved", 2)
    studio.train()
    assert studio.states() == {"pending": 0, "trained": 2, "durable": 12, "failed": 0, "undone": 0}
    done = studio.roll_back(1)
    assert studio.states() == {"pending": 0, "trained": 0, "durable": 4, "failed": 0, "undone": 10}
    assert (done["passes_undone"], done["examples_undone"], done["examples_reopened"]) == (40, 10, 0), (
        "20 of their own, and one replayed beside each of them"
    )
    assert studio.ledger.is_idle(), "what was undone stays out"
    studio.drop("later", 1)
    studio.train()
    assert studio.states()["undone"] == 10
    assert studio.save() == 4
    state = generation.read_state(studio.keeper.checkpoints.folders()[4])
    assert state["parent"] == 1
    # And back to what was left: the rollback itself is undone.
    done = studio.roll_back(3)
    assert studio.states() == {"pending": 0, "trained": 0, "durable": 12, "failed": 0, "undone": 3}
    studio.close()


def test_with_retrain_what_was_undone_is_trained_again(root):
    studio = Studio(root)
    story(studio)
    done = studio.roll_back(1, retrain=True)
    assert done["examples_reopened"] == 8
    assert studio.states() == {"pending": 8, "trained": 0, "durable": 4, "failed": 0, "undone": 0}
    studio.train()
    assert studio.states()["trained"] == 8
    studio.close()


def test_what_an_earlier_rollback_set_aside_is_trained_when_that_is_asked_for_afterwards(root):
    studio = Studio(root)
    story(studio)
    studio.roll_back(1)
    assert studio.states()["undone"] == 8
    done = studio.roll_back(1, retrain=True)
    assert done["examples_reopened"] == 8
    assert (studio.states()["pending"], studio.states()["undone"]) == (8, 0)
    studio.close()


def test_tidying_meanwhile_leaves_the_generation_alone(root):
    """Kept folders: one. The folder that a rollback makes is one too many until `current` leads to it."""
    studio = Studio(root, checkpoint__keep=1)
    versions = story(studio)

    def slow() -> None:
        time.sleep(1.0)  # longer than it takes to make the folder
        studio.keeper.tidy()

    studio.keeper.background(slow)
    studio.roll_back(1)
    assert studio.bits() == versions[1]
    studio.keeper.tidy()
    assert set(studio.keeper.checkpoints.folders()) == {1}, "and afterwards the others go"
    studio.close()


def test_training_goes_on_by_itself_if_it_was_going_on(root):
    studio = Studio(root)
    story(studio)
    studio.learner.start()
    studio.roll_back(2)
    assert studio.learner.training
    studio.learner.pause()
    studio.roll_back(1)
    assert not studio.learner.training
    studio.close()


def test_a_generation_that_does_not_exist_changes_nothing(root):
    studio = Studio(root)
    versions = story(studio)
    with pytest.raises(CheckpointError, match=r"there is no generation 9 .* there are: 0, 1, 2, 3"):
        studio.roll_back(9)
    assert studio.bits() == versions[3]
    assert rollback.pending(studio.ledger) is None
    studio.close()


def test_a_damaged_generation_falls_back_to_the_last_good_one_by_name(root, capsys):
    studio = Studio(root, checkpoint__keep=1)
    versions = story(studio)
    path = root / "state" / "history" / "generation-00000002" / "delta.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = studio.roll_back(2)
    assert (done["asked"], done["generation"]) == (2, 1)
    assert studio.bits() == versions[1]
    said = capsys.readouterr().out
    assert "history.damaged" in said
    assert "history.fell_back" in said
    assert str(path) in said
    studio.close()


def test_without_an_arena_the_next_one_is_written(root):
    """The server is away, or nobody has started: the disk changes now, the weights when they come."""
    studio = Studio(root)
    versions = story(studio)
    arena = studio.close()
    for offered in (arena, None):  # one that outlived the daemon with the newest weights; a fresh one
        studio = Studio(root, arena=arena)
        arena = studio.close()
        ledger, keeper = _offline(root)
        done = rollback.roll_back(1, retrain=False, ledger=ledger, keeper=keeper, learner=None)
        assert not done["live"]
        ledger.close()
        keeper.close()
        studio = Studio(root, arena=offered)
        assert studio.bits() == versions[1]
        assert studio.states()["undone"] == 8
        assert rollback.pending(studio.ledger) is None
        studio.roll_back(3)
        arena = studio.close()


def _offline(root: Path) -> tuple[Any, Any]:
    from hogwild import config as configuration
    from hogwild.keeper import Keeper
    from hogwild.ledger import Ledger

    config = configuration.load(None, {"state_dir": str(root / "state")})
    return Ledger(root / "state" / "ledger.sqlite"), Keeper(config)


# --- the start -------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_current_checkpoint_is_made_anew_from_history(root):
    studio = Studio(root)
    versions = story(studio)
    studio.close()
    damage(root / "state" / "checkpoints" / "generation-00000003" / "model.safetensors")
    damage(root / "state" / "checkpoints" / "generation-00000003" / "hogwild" / "optimizer.safetensors")
    studio = Studio(root)
    assert studio.bits() == versions[3]
    assert studio.states()["durable"] == 12
    studio.close()


def damage_beyond_repair(root):
    """Generation 3, in its folder and in history."""
    for path in (
        "checkpoints/generation-00000003/model.safetensors",
        "history/generation-00000003/delta.bin",
    ):
        damage(root / "state" / path)


def test_where_that_is_impossible_the_last_good_one_is_current_and_the_rest_is_trained_again(root, capsys):
    studio = Studio(root)
    versions = story(studio)
    studio.close()
    damage_beyond_repair(root)
    studio = Studio(root)
    assert "history.fell_back" in capsys.readouterr().out
    assert studio.keeper.checkpoints.current_generation() == 2
    assert studio.bits() == versions[2]
    assert studio.states() == {"pending": 4, "trained": 0, "durable": 8, "failed": 0, "undone": 0}
    studio.train()
    assert studio.save() == 4, "the number of what was lost is not used again"
    studio.close()


def test_what_takes_the_place_of_a_damaged_one_is_not_tidied_away_before_it_does(root, monkeypatch):
    """A daemon tidies from its start on, while the newest checkpoint is looked at for a server that has come. Kept
    folders: one, and that is the damaged one."""
    studio = Studio(root, checkpoint__keep=1)
    versions = story(studio)
    studio.close()
    damage_beyond_repair(root)
    restore, restore_current = History.restore, Keeper.restore_current
    keepers: list[Keeper] = []

    def note_and_restore_current(keeper):
        keepers.append(keeper)
        return restore_current(keeper)

    def restore_and_tidy(history, number):
        folder = restore(history, number)
        keepers[0].background(keepers[0].tidy).result()
        return folder

    monkeypatch.setattr(Keeper, "restore_current", note_and_restore_current)
    monkeypatch.setattr(History, "restore", restore_and_tidy)
    studio = Studio(root, checkpoint__keep=1)
    assert studio.keeper.checkpoints.current_generation() == 2
    assert studio.bits() == versions[2]
    monkeypatch.undo()
    studio.keeper.tidy()
    assert set(studio.keeper.checkpoints.folders()) == {2}
    studio.close()


def test_nothing_falls_back_to_the_untrained_model_by_itself(root):
    studio = Studio(root)
    studio.drop("a", 2)
    studio.train()
    studio.save()
    studio.close()
    for path in (
        "checkpoints/generation-00000001/model.safetensors",
        "history/generation-00000001/delta.bin",
    ):
        damage(root / "state" / path)
    with pytest.raises(CheckpointError, match=r"is generation 0, .* `hogwild rollback 0 --retrain`"):
        Studio(root)


def test_after_going_back_to_the_model_as_it_came_it_is_had_from_there_again(root):
    """Nothing was saved before; the complete folder is damaged, and the model lies where it always did."""
    studio = Studio(root)
    untrained = studio.bits()
    studio.drop("a", 2)
    studio.train()
    studio.roll_back(0)
    assert studio.bits() == untrained
    studio.close()
    folder = root / "state" / "checkpoints" / "generation-00000000"
    damage(folder / "tokenizer.json")
    studio = Studio(root)
    assert studio.bits() == untrained
    assert studio.keeper.checkpoints.current_generation() == 0
    generation.verify(folder)
    studio.close()
    for path in (folder, root / "model"):
        damage(path / "model.safetensors")
    _, keeper = _offline(root)
    with pytest.raises(CheckpointError, match="generation 0 cannot be restored") as caught:
        keeper.restore_current()
    assert str(folder) in str(caught.value)
    assert str(root / "model") in str(caught.value)


@pytest.mark.parametrize("last", ["put", "point_current_at"])
@pytest.mark.parametrize("survives", [True, False], ids=["the server lives", "both are killed"])
def test_a_checkpoint_that_was_complete_when_the_daemon_was_killed_counts(root, monkeypatch, last, survives):
    """Its folder is there, and the ledger has not heard of it. To go back before it and to it again is as exact as with
    any other."""
    studio = Studio(root)
    studio.drop("a", 2)
    studio.train()
    studio.save()
    studio.drop("b", 3)
    studio.train()
    second, write = studio.bits(), getattr(Checkpoints, last)

    def write_and_die(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Checkpoints, last, write_and_die)
        with pytest.raises(KeyboardInterrupt):
            studio.save()
    arena = studio.close() if survives else studio.close() and None
    studio = Studio(root, arena)
    assert studio.keeper.checkpoints.current_generation() == studio.arena.control.generation == 2
    assert studio.bits() == second
    assert studio.states() == {"pending": 0, "trained": 0, "durable": 5, "failed": 0, "undone": 0}
    studio.roll_back(1)
    assert studio.states()["undone"] == 3
    studio.roll_back(2)
    assert studio.bits() == second
    assert studio.states() == {"pending": 0, "trained": 0, "durable": 5, "failed": 0, "undone": 0}
    studio.close()
    assert Studio(root).states()["durable"] == 5


def test_a_checkpoint_that_failed_at_its_end_is_not_finished_after_a_rollback(root, monkeypatch):
    """Its folder was complete, the link to it could not be made. Then somebody goes back, and the daemon restarts."""
    studio = Studio(root)
    studio.drop("a", 2)
    studio.train()
    studio.save()
    first = studio.bits()
    studio.drop("b", 3)
    studio.train()

    def full(checkpoints, generation):
        raise CheckpointError(f"{checkpoints.root}: no room for a link to {generation}")

    with monkeypatch.context() as no_room:
        no_room.setattr(Checkpoints, "point_current_at", full)
        with pytest.raises(AssertionError, match="no room"):
            studio.save()
    studio.roll_back(1)
    studio.close()
    studio = Studio(root)
    assert studio.keeper.checkpoints.current_generation() == 1
    assert studio.bits() == first
    assert studio.states()["undone"] == 3
    studio.close()


# --- the snapshot ----------------------------------------------------------------------------------------------------


def test_what_is_marked_durable_is_in_the_checkpoint_that_is_written_meanwhile(root):
    """A writer puts its own number into every weight and then books the pass; checkpoints are written meanwhile.

    Every element must then hold the number of a pass: at least the one that the checkpoint claims, since that was
    booked before the writing began.
    """
    studio = Studio(root, training__passes=1000)
    studio.drop("a", 1)
    (pending,) = studio.ledger.pending(1)
    weights, stop = studio.learner.weights, threading.Event()

    def write() -> None:
        for number in range(1, 257):  # bf16 holds these exactly
            for name in weights.names:
                weights.view(name).fill_(float(number))
            studio.ledger.record_passes(
                [
                    Pass(
                        pending.example_id,
                        1.0,
                        None,
                        tokens=1,
                        step=number,
                        thread=0,
                        arena_id=studio.arena.control.arena_id,
                    )
                ]
            )
            if stop.wait(0.01):
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        claims = []
        for _ in range(5):
            number = studio.save()
            folder = studio.keeper.checkpoints.folders()[number]
            claims.append(generation.read_state(folder)["ledger_position"])
            for name, tensor in read_tensors(folder):
                values = tensor.float()
                assert bool((values == values.round()).all()), name
                assert float(values.min()) >= claims[-1], name
                assert float(values.max()) <= 256, name
        assert len(set(claims)) > 1, "it wrote on meanwhile"
    finally:
        stop.set()
        writer.join()
    studio.close()


# --- killed in the middle --------------------------------------------------------------------------------------------

_WATCHED = tuple(
    f"hogwild/{name}.py"
    for name in ("rollback", "learner", "ledger", "checkpoint", "weights", "trainer", "apollo", "files", "history",
                 "arena/control")
)  # fmt: skip


def die_at(fatal: int) -> list[int]:
    """SIGKILL to this process just before the `fatal`-th call of a function that a rollback is made of."""
    calls = [0]

    def watch(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(_WATCHED):
            calls[0] += 1
            if calls[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    return calls


def rolling_back(pipe: Any, root: Path, arena: Arena, fatal: int) -> None:
    studio = Studio(root, arena=arena)
    calls = die_at(fatal)
    studio.roll_back(1)
    sys.setprofile(None)
    pipe.send(("survived", calls[0]))
    os._exit(0)


@pytest.mark.timeout(1200)
def test_killed_anywhere_it_is_either_not_begun_or_finished_at_the_next_start(root):
    """Real SIGKILLs, spread over all calls that a rollback makes; the weights lie in memory that outlives the process.

    Afterwards weights, moments, ledger and `current` are all of generation 1, or all as they were.
    """
    studio = Studio(root, checkpoint__keep=1)
    versions = story(studio)
    arena = studio.close()
    newest = bytes(arena.weights.mapping)
    control = bytes(arena.control.segment.mapping)
    first = root / "first"
    shutil.copytree(root / "state", first, symlinks=True)

    def attempt(fatal: int) -> tuple[bool, int]:
        shutil.rmtree(root / "state")
        shutil.copytree(first, root / "state", symlinks=True)
        arena.weights.mapping[:] = newest
        arena.control.segment.mapping[:] = control
        child = Child(rolling_back, root, arena, fatal)
        child.process.join()
        calls = child.hear("survived") if child.process.exitcode == 0 else 0
        assert calls or child.process.exitcode == -signal.SIGKILL
        after = Studio(root, arena=arena)
        done = after.keeper.checkpoints.current_generation() == 1
        assert after.bits() == versions[1 if done else 3], f"killed at call {fatal}"
        assert after.states()["undone"] == (8 if done else 0)
        assert after.states()["durable"] == (4 if done else 12)
        assert rollback.pending(after.ledger) is None
        for folder in after.keeper.checkpoints.folders().values():
            generation.verify(folder)
        after.close()
        return done, calls

    done, total = attempt(10**9)
    assert done
    outcomes = [attempt(total * part // 16 + 1)[0] for part in range(16)]
    assert not outcomes[0]
    assert outcomes == sorted(outcomes), "not begun first, finished from some moment on"
    assert 2 <= sum(outcomes) <= 14, "the kills fell on both sides of the intent"
