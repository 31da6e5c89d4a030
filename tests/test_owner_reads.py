"""What is read of weights whose owner has ended is kept nowhere: not on disk, not in the ledger.

The memory is that of a CPU, which outlives its maker; what says that it has not is the one stand-in here. What says so
on a GPU is tested in test_arena_ipc.py.
"""

import pytest

from hogwild.errors import ArenaError
from hogwild.trainer import Trainer
from studio import DEADLINE_S, Studio, model
from support import wait_until


class Life:
    """Of the owner: as long as it lives, reads count."""

    lives, asked = True, 0

    def __call__(self) -> None:
        self.asked += 1
        if not self.lives:
            raise ArenaError("the server, process 1, ended while its weights were read")


@pytest.fixture
def owner(monkeypatch):
    life = Life()
    monkeypatch.setattr("hogwild.arena.memory.Segment.ensure_alive", lambda _segment: life())
    return life


@pytest.fixture
def studio(tmp_path, owner):
    model(tmp_path / "model")
    studio = Studio(tmp_path, replay__ratio=0, training__passes=9)
    studio.drop("a.jsonl", 2)
    studio.learner.wait_for_own_texts()
    yield studio
    owner.lives = True
    studio.close()


KEPT = ("selfreplay.json", "probes.json", "protected.safetensors")


@pytest.mark.parametrize("lives", [True, False])
def test_what_the_model_writes_before_it_is_trained_is_kept_if_its_owner_has_lived(tmp_path, owner, lives):
    model(tmp_path / "model")
    owner.lives = lives
    studio = Studio(tmp_path)
    studio.learner.wait_for_own_texts()
    assert {path.name for path in studio.config.state_dir.iterdir()} & set(KEPT) == (
        set(KEPT) if lives else set()
    )
    assert owner.asked >= 2
    studio.close()


def fails(studio: Studio) -> None:
    """It trains until it notices."""
    studio.learner.start()
    wait_until(lambda: studio.learner.failure, "the trainer ends", DEADLINE_S)
    assert isinstance(studio.learner.failure, ArenaError)


def test_scores_that_others_are_held_against_are_kept_if_the_owner_has_lived(studio, owner):
    owner.lives = False
    fails(studio)
    assert studio.ledger.get_meta("probes_base") is None
    assert studio.ledger.newest_pass() == 0


def test_probes_that_fall_because_the_weights_are_gone_trip_nothing(studio, owner):
    studio.train(passes=2)
    owner.lives = False
    studio.learner.weights.view("model.norm.weight").fill_(float("nan"))
    with pytest.raises(ArenaError):
        studio.learner.judge.judge()
    assert studio.learner.judge.tripped is None


def test_no_example_is_blamed_for_weights_that_are_gone(studio, owner):
    studio.train(passes=2)
    owner.lives = False
    studio.learner.weights.view("model.norm.weight").fill_(float("nan"))
    fails(studio)
    assert not studio.ledger.guards.suspects()
    for one in studio.ledger.pending(9):
        assert {strike["guard"] for strike in studio.ledger.guards.strikes(one.example_id)} <= {"crash"}


def test_no_example_is_blamed_for_an_error_that_weights_being_gone_has_made(studio, owner, monkeypatch):
    """Memory that is unmapped under a kernel is an illegal access, for a GPU."""
    studio.train(passes=2)
    owner.lives = False

    def step(_trainer: Trainer, _items: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Trainer, "step", step)
    studio.learner.start()
    wait_until(lambda: studio.learner.failure, "the trainer ends", DEADLINE_S)
    assert [one.crashes for one in studio.ledger.pending(9)] == [0, 0]
    owner.lives = True
    with pytest.raises(RuntimeError):
        studio.learner.turn.take(
            studio.learner.trainers[0], 0, studio.learner.curriculum.take(timeout=1, step=9)
        )
    assert 3 in [one.crashes for one in studio.ledger.pending(9)], "one that the step itself has made"
