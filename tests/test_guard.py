"""What guards let through, what they stop, and what they say about it. Real trainers on a tiny model."""

import math
import time

import pytest
import torch
from structlog.testing import capture_logs

from hogwild import trips
from hogwild.errors import LedgerError
from hogwild.guard import growing, largest_loss
from hogwild.ledger import Pass, Trip
from hogwild_kernels import AdamConfig, AdamState, ApolloConfig, ApolloState, adam_update, apollo_update
from studio import DEADLINE_S, Studio, model
from support import wait_until
from tiny import llama, tokenizer


@pytest.fixture
def studio(tmp_path):
    model(tmp_path / "model")
    studio = Studio(tmp_path, replay__ratio=0, probes__own=0)
    yield studio
    studio.close()


def train(studio: Studio) -> list[dict]:
    with capture_logs() as events:
        studio.learner.start()
        wait_until(studio.ledger.is_idle, "nothing is left to train", DEADLINE_S)
        studio.learner.pause()
        assert studio.learner.quiet(DEADLINE_S)
    assert studio.learner.failure is None
    return events


@pytest.mark.parametrize(
    ("losses", "hurts"),
    [
        ([3.0, 2.0, 1.0], False),
        ([1.0, 2.0], False),
        ([1.0, 2.0, 3.5], True),
        ([1.0, 2.0, 2.9], False),  # by less than the margin
        ([1.0, 4.0, 3.0, 3.9], False),  # it went down in between
        ([5.0, 1.0, 2.0, 6.0], False),  # not above the first by the margin
        ([0.5, 1.0, 2.0, 6.0], True),
        ([1.0, 2.0, math.inf], True),
    ],
)
def test_growing(losses, hurts):
    assert growing(losses, 2.0) is hurts


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e15])
def test_an_update_is_bounded_however_large_the_gradient_is(size):
    """Why there is no limit of its own for exploding updates: the moments normalise a spike, the limiter caps what is
    left, and what overflows is skipped. 100 ordinary steps, then a gradient that is `size` times as large."""
    torch.manual_seed(0)
    config = ApolloConfig(rank=4, lr=1e-3)
    weight, state = torch.randn(24, 16), ApolloState("w", (24, 16), config)
    small, small_state = torch.ones(16), AdamState("n", (16,), AdamConfig(lr=1e-3))
    usual = 0.0
    for _ in range(100):
        result = apollo_update(weight, torch.randn(5, 16), torch.randn(5, 24), state)
        usual = max(usual, float(result.norm))
        adam_update(small, torch.randn(16), small_state)
    before = weight.clone()
    spike = apollo_update(weight, torch.randn(5, 16), torch.randn(5, 24) * size, state)
    assert float(spike.norm) <= config.gamma * usual * 1.05
    assert float((weight - before).norm()) == pytest.approx(float(spike.norm), rel=0.01)
    bound = 1e-3 * (1 - 0.9) / math.sqrt(1 - 0.999) * 16**0.5 * 1.05  # lr * (1-b1)/sqrt(1-b2), 16 elements
    assert float(adam_update(small, torch.randn(16) * size, small_state).norm) <= bound


def test_an_example_whose_loss_explodes_is_set_aside_with_its_evidence(studio):
    """And its neighbours train. The limit is set so low that one of three is above it."""
    studio.drop("a.jsonl", 3)
    pending = studio.ledger.pending(3)
    groups = [studio.learner.encoder.group(one.example()) for one in pending]
    losses = {
        one.example_id: group.loss(studio.learner.trainers[0])
        for one, group in zip(pending, groups, strict=True)
    }
    worst, limit = max(losses, key=losses.__getitem__), sorted(losses.values())[-1] - 1e-3
    studio.learner.trainers[0]._max_loss = limit
    events = train(studio)
    assert studio.states() == {"pending": 0, "trained": 2, "durable": 0, "failed": 0, "undone": 0}
    assert studio.ledger.counts().quarantined == 1
    refused = [event for event in events if event["event"] == "guard.refused"]
    assert len(refused) == studio.config.guard.strikes
    (said,) = [event for event in events if event["event"] == "example.quarantined"]
    (suspect,) = studio.ledger.guards.suspects()
    assert suspect.example_id == worst
    assert (suspect.guard, suspect.file) == ("loss", "a.jsonl")
    assert said["line"] == suspect.line_no
    strikes = suspect.about["strikes"]
    assert len(strikes) == studio.config.guard.strikes
    assert all(strike["loss"] == pytest.approx(losses[worst], abs=0.5) for strike in strikes)
    assert studio.ledger.guards.trips() == {"loss": 1}
    # As any line that is not trained, in failed/<name>.errors.jsonl.
    (error,) = [line for _, _, line in studio.ledger.errors("a.jsonl")]
    assert "nats a token" in error.reason
    assert studio.ledger.errors_due()
    # And out again, on request.
    studio.learner.trainers[0]._max_loss = math.inf
    assert studio.ledger.guards.release(file="a.jsonl") == 1
    studio.curriculum.wake()
    train(studio)
    assert studio.states()["trained"] == 3
    assert not studio.ledger.errors("a.jsonl")


def test_a_loss_that_is_no_number_reaches_no_weight(tmp_path):
    """Something that makes NaN of one word: a row of the embeddings, which are frozen."""
    tokenizer(llama(tmp_path / "model", torch.bfloat16, tie_word_embeddings=False))
    studio = Studio(tmp_path, replay__ratio=0)
    row = studio.learner.encoder.tokenizer.convert_tokens_to_ids("w58")
    studio.learner.weights.view("model.embed_tokens.weight")[row] = float("nan")
    studio.accept("a.jsonl", [b'{"text": "w1 w2 w3"}', b'{"text": "w4 w58 w4 w5"}', b'{"text": "w6 w7"}'])
    train(studio)
    assert studio.states() == {"pending": 0, "trained": 2, "durable": 0, "failed": 0, "undone": 0}
    (suspect,) = studio.ledger.guards.suspects()
    assert (suspect.guard, suspect.line_no) == ("loss", 2)
    assert [strike["loss"] for strike in suspect.about["strikes"]] == [None] * 3
    layers = [name for name in studio.learner.weights.names if "embed" not in name]
    assert all(torch.isfinite(studio.learner.weights.view(name)).all() for name in layers)
    studio.close()


def test_weights_that_are_no_numbers_are_not_blamed_on_examples(tmp_path):
    """Then every example's loss is NaN. The probes see that first: nobody is set aside for it."""
    model(tmp_path / "model")
    studio = Studio(tmp_path, replay__ratio=0)
    studio.accept("a.jsonl", [b'{"text": "w1 w2 w3"}'] * 2)
    train(studio)
    studio.learner.weights.view("model.norm.weight")[3] = float("nan")
    studio.accept("b.jsonl", [b'{"text": "w4 w5 w6"}'] * 2)
    studio.learner.start()
    wait_until(lambda: studio.learner.judge.tripped, "the probes fall", DEADLINE_S)
    assert studio.learner.quiet(DEADLINE_S)
    assert not studio.learner.training
    assert not studio.ledger.guards.suspects()
    assert studio.learner.judge.tripped.about["own"]["is"] is None
    studio.close()


def test_updates_that_the_kernels_refuse_are_counted_against_the_example(studio, monkeypatch):
    """A backward pass that overflows although the loss is fine."""
    studio.drop("a.jsonl", 1)
    trainer = studio.learner.trainers[0]
    step = trainer.step

    def overflows(items):
        name = "model.layers.0.mlp.down_proj"
        layer = trainer.model.get_submodule(name)
        receive = layer.receive
        layer.receive = lambda x, d: receive(x, d * float("inf"))
        try:
            return step(items)
        finally:
            del layer.receive

    monkeypatch.setattr(trainer, "step", overflows)
    with studio.ledger._db.write(fsync=False) as db:
        db.execute("UPDATE examples SET passes = 50")
    studio.curriculum.wake()
    train(studio)
    (suspect,) = studio.ledger.guards.suspects()
    assert suspect.guard == "update"
    assert len(suspect.about["strikes"]) == studio.config.guard.strikes
    assert all(strike["skipped"] >= 1 and strike["update_norm"] > 0 for strike in suspect.about["strikes"])


def test_an_example_whose_own_loss_grows_although_it_is_trained_is_set_aside(studio, monkeypatch):
    studio.drop("a.jsonl", 1)
    with studio.ledger._db.write(fsync=False) as db:
        db.execute("UPDATE examples SET passes = 50")
    measured = iter([1.0, 1.5, 2.5, 3.5])
    monkeypatch.setattr("hogwild.turn.regroup", lambda groups, _result: [(next(measured), 5) for _ in groups])
    studio.curriculum.wake()
    train(studio)
    (suspect,) = studio.ledger.guards.suspects()
    assert suspect.guard == "growth"
    assert suspect.about["losses"] == [1.0, 1.5, 2.5, 3.5]
    assert studio.ledger.guards.losses(suspect.example_id) == [], "what came before does not count again"


def test_the_limit_of_the_loss_is_far_above_what_a_model_has_that_knows_nothing(studio):
    assert largest_loss(studio.config.guard, 64) == pytest.approx(3 * math.log(64))


def test_measurements_are_kept_by_name_and_a_nan_is_a_gap(studio):
    studio.ledger.guards.note(3, {"probes.own": 1.5, "serving.running": 2})
    studio.ledger.guards.note(4, {"probes.own": float("nan")})
    found = studio.ledger.guards.series("probes.")
    assert [(step, value) for _, step, value in found["probes.own"]] == [(3, 1.5), (4, None)]
    assert list(found) == ["probes.own"]


def test_an_error_in_a_step_counts_as_three_deaths_or_not_at_all(studio):
    """The disk may become full while it is noted."""
    studio.accept("a", [b'{"text": "w1 w2"}'] * 2)
    guard, examples = studio.learner.guard, studio.ledger.pending(9)

    def crashes() -> list[int]:
        return [one.crashes for one in studio.ledger.pending(9)]

    guard.trying(examples)
    with studio.ledger._db.write(fsync=False) as db:
        db.execute(
            "CREATE TEMP TRIGGER full BEFORE INSERT ON strikes WHEN (SELECT count(*) FROM strikes) = 5"
            " BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
    with pytest.raises(LedgerError):
        guard.died(examples, RuntimeError("poison"))
    assert crashes() == [1, 1]
    with studio.ledger._db.write(fsync=False) as db:
        db.execute("DROP TRIGGER full")
    guard.died(examples, RuntimeError("poison"))
    assert crashes() == [3, 3]


def test_measurements_go_after_90_days(studio, monkeypatch):
    """By the clock that a jump of the system clock does not move."""
    studio.ledger.guards.note(3, {"probes.own": 1.5})
    monkeypatch.setattr("hogwild.clock.now", lambda: time.time() + 89 * 86400)
    studio.ledger.guards.note(4, {"probes.own": 1.4})
    assert [step for _, step, _ in studio.ledger.guards.series("probes.")["probes.own"]] == [3, 4]
    monkeypatch.setattr("hogwild.clock.now", lambda: time.time() + 91 * 86400)
    studio.ledger.guards.note(5, {"probes.own": 1.3})
    assert studio.ledger.guards.series("probes.") == {}, "all three bear the system clock's time"


def test_everything_that_the_probes_set_aside_is_counted(studio):
    """On a GPU thousands of examples are trained between two scorings."""
    ledger = studio.ledger
    studio.drop("many", 1100)
    arena = studio.arena.control.arena_id
    passes = [Pass(one.example_id, 1.0, None, 3, 1, 0, arena) for one in ledger.pending(2000)]
    ledger.record_passes(passes)
    ledger.roll_back(0, retrain=False, trip=Trip("probes", 1, {}))
    assert ledger.counts().quarantined == 1100
    with capture_logs() as said:
        trips._say(ledger, set(), {}, {"generation": 0})
    assert (said[0]["count"], said[0]["files"]) == (1100, {"many": 1100})
    assert len(said[0]["examples"]) == 50


def test_an_innocent_file_loses_nothing_by_the_trips_of_another(studio):
    """`rest_of_files` counts the trips of the probes by file, and takes only what is still to be trained."""
    for name in ("bad", "good"):
        studio.accept(name, [b'{"text": "w1 w2"}'] * 3)
    bad, good = (
        [one.example_id for one in studio.ledger.pending(9) if one.file == name] for name in ("bad", "good")
    )
    guards = studio.ledger.guards
    guards.set_aside(bad[0], Trip("probes", 1, {}), "first", {})
    assert guards.rest_of_files(2, "again") == {}
    guards.set_aside(good[0], Trip("probes", 2, {}), "once", {})
    guards.set_aside(bad[1], Trip("probes", 3, {}), "second", {})
    assert guards.rest_of_files(2, "again") == {"bad": 1}
    assert {one.example_id for one in studio.ledger.pending(9)} == set(good[1:])
    assert guards.release([bad[2]]) == 1
    assert bad[2] in {one.example_id for one in studio.ledger.pending(9)}
