"""What comes in between: files, rollbacks, scores, failures, at moments when they hurt. Real threads, a tiny model."""

import contextlib
import errno
import http.server
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hogwild import probes, recovery, rollback
from hogwild.attachment import Attachment
from hogwild.checkpoint_schedule import CheckpointSchedule
from hogwild.commands import Command
from hogwild.errors import CheckpointError, LedgerError
from hogwild.files import Sink
from hogwild.going_back import GoingBack
from hogwild.ledger import Trip
from hogwild.status import Status, Troubles
from hogwild.trainer import Trainer
from hogwild.weights import read_tensors
from studio import DEADLINE_S, Studio, model
from support import free_port, wait_until
from test_checkpoint import small_disk
from tiny import WORDS

QUIET = {"replay__self_texts": 0, "probes__own": 0}


@pytest.fixture
def root(tmp_path):
    model(tmp_path / "model")
    return tmp_path


def learned(root: Path) -> Studio:
    """With generation 1."""
    studio = Studio(root, **QUIET)
    studio.drop("a", 2)
    studio.train()
    studio.save()
    return studio


def going_back(studio: Studio) -> GoingBack:
    schedule = CheckpointSchedule(studio.config, studio.ledger, studio.keeper)
    attachment = SimpleNamespace(learner=studio.learner, changing=threading.Lock(), must_check=False)
    return GoingBack(studio.ledger, studio.keeper, schedule, attachment)


def ask_for(back: GoingBack, generation: int, *, retrain: bool = False) -> dict:
    command = Command("rollback", {"generation": generation, "retrain": retrain})
    back.on_command(command)
    return command.wait()


def test_a_file_that_comes_during_a_rollback_is_trained_after_it(root, monkeypatch):
    """A trainer that has nothing to do waits for an example, and gets it while the weights are replaced."""
    studio = Studio(root, **QUIET)
    studio.drop("a", 4)
    studio.train()
    studio.save()
    one = studio.bits()
    studio.drop("b", 4)
    studio.train()
    studio.save()
    waiting, take = threading.Event(), studio.curriculum.take

    def noted(*args, **kwargs):
        waiting.set()
        return take(*args, **kwargs)

    weights, during = studio.learner.weights, {}
    write = weights.write

    def slow(folder):
        studio.drop("new", 1)
        write(folder)
        time.sleep(1.0)  # twice as long as a trainer waits for an example
        during.update(studio.bits())

    monkeypatch.setattr(studio.curriculum, "take", noted)
    monkeypatch.setattr(weights, "write", slow)
    studio.learner.start()
    assert waiting.wait(DEADLINE_S)
    studio.roll_back(1)
    assert {name: during[name] for name in weights.names} == {name: one[name] for name in weights.names}
    wait_until(studio.ledger.is_idle, "the new file is learned", DEADLINE_S)
    assert [one.undone for one in studio.ledger.files() if one.name == "new"] == [0]
    studio.close()


def test_a_rollback_waits_for_a_score_that_is_being_taken(root, monkeypatch):
    """One that is measured half with the weights of before would be compared with the generation of after."""
    studio = Studio(root, **{**QUIET, "probes__own": 4}, probes__every_updates=4, probes__margin=50.0)
    studio.learner.wait_for_own_texts()
    studio.drop("a", 2)
    studio.train()
    assert studio.save() == 1
    began, go_on, ended, measure = threading.Event(), threading.Event(), threading.Event(), probes.measure

    def slow(*args):
        began.set()
        assert go_on.wait(DEADLINE_S)
        result = measure(*args)
        ended.set()
        return result

    studio.drop("b", 4)
    monkeypatch.setattr(probes, "measure", slow)
    studio.learner.start()
    assert began.wait(DEADLINE_S)
    wait_until(lambda: studio.curriculum.in_flight == 0, "the step is recorded", DEADLINE_S)
    threading.Timer(0.5, go_on.set).start()
    restored, restore = [], studio.learner.restore

    def noted(*args):
        restored.append(ended.is_set())
        return restore(*args)

    monkeypatch.setattr(studio.learner, "restore", noted)
    studio.roll_back(1)
    assert restored == [True]
    studio.close()


@pytest.mark.parametrize("stuck", [False, True])
def test_after_a_rollback_of_what_had_fallen_training_is_asked_for_again(root, stuck):
    studio = learned(root)
    studio.learner.judge.tripped = Trip("probes", 4, {})  # as Judge.judge leaves it: at rest
    back = going_back(studio)
    if stuck:
        back.on_trip(studio.learner, go_on=True)  # there is no score of a good generation
        assert back.stuck
    assert ask_for(back, 1)["status"] == "done"
    assert (back.stuck, studio.learner.judge.tripped) == (False, None)
    assert back._attachment.must_check, "the supervisor compares with the server, and starts the trainers"
    assert not studio.learner.training, "not before"
    studio.close()


def test_what_falls_while_a_rollback_waits_for_a_checkpoint_does_not_keep_training_at_rest(root, monkeypatch):
    """The checkpoint that is being written begins with a score."""
    studio = learned(root)
    studio.learner.start()
    settle = studio.keeper.settle

    def fallen():
        studio.learner.judge.tripped = Trip("probes", 4, {})
        studio.learner.pause()
        settle()

    monkeypatch.setattr(studio.keeper, "settle", fallen)
    back = going_back(studio)
    assert ask_for(back, 1)["status"] == "done"
    assert studio.learner.judge.tripped is None
    assert back._attachment.must_check, "the supervisor compares with the server, and starts the trainers"
    studio.close()


def test_a_rollback_and_a_reload_that_come_while_weights_are_verified_are_of_these_weights(root, monkeypatch):
    studio = learned(root)
    one = studio.bits()
    studio.drop("b", 2)
    studio.train()
    studio.save()
    assert studio.learner.stop(DEADLINE_S)
    schedule = CheckpointSchedule(studio.config, studio.ledger, studio.keeper)
    attachment = Attachment(studio.config, studio.ledger, studio.keeper, studio.curriculum, schedule)
    began, go_on, take = threading.Event(), threading.Event(), recovery.take

    def slow(*given):
        began.set()
        assert go_on.wait(DEADLINE_S)
        return take(*given)

    monkeypatch.setattr(recovery, "take", slow)
    session = threading.Thread(target=attachment.offered, args=(studio.arena,))
    session.start()
    assert began.wait(DEADLINE_S)
    strict = studio.config.governor.model_copy(update={"policy": "strict"})
    attachment.configure(studio.config.model_copy(update={"governor": strict}))
    threading.Timer(0.5, go_on.set).start()
    done = ask_for(GoingBack(studio.ledger, studio.keeper, schedule, attachment), 1)
    session.join()
    assert (done["generation"], done["live"]) == (1, True)
    studio.learner = attachment.learner
    assert studio.bits() == one
    assert rollback.pending(studio.ledger) is None
    assert studio.learner.governor._settings == strict
    studio.close()


def test_a_rollback_that_cannot_be_noted_changes_nothing_and_training_goes_on(root, monkeypatch):
    studio = learned(root)
    before = studio.bits()
    studio.learner.start()

    def full(*_arguments):
        raise LedgerError("ledger.sqlite: database or disk is full")

    monkeypatch.setattr(studio.ledger, "set_meta", full)
    answer = ask_for(going_back(studio), 1)
    assert (answer["status"], rollback.pending(studio.ledger)) == ("refused", None)
    assert studio.bits() == before
    assert studio.learner.training
    studio.close()


@pytest.mark.parametrize("kib", [0, 40, 200])
def test_on_a_full_disk_a_rollback_beside_a_checkpoint_changes_nothing_or_is_finished_by_the_next_start(
    root, kib
):
    """What is asked for is only in history and has to be written first; or it is there, and the ledger has no room."""
    with small_disk(root / "state", 6000):
        settings = {**QUIET, "checkpoint__keep": 1, "history__base_every": 0}
        studio = Studio(root, **settings)
        for number in range(4):
            studio.drop(f"{number}", 2)
            studio.train()
            if number < 3:
                studio.save()
        before, passes = studio.bits(), studio.ledger.counts().passes
        room, filler = os.statvfs(root / "state"), root / "state" / "filler"
        filler.write_bytes(bytes(max(room.f_bavail * room.f_bsize - kib * 1024, 0)))
        back = going_back(studio)
        for generation in (1, 2):  # only in history
            back._schedule.begin(studio.learner)
            assert "No space left" in ask_for(back, generation)["error"]
            assert (studio.bits(), studio.ledger.counts().passes) == (before, passes)
            with contextlib.suppress(LedgerError):  # ends the service
                back._schedule.collect(wait=True)
        try:
            gone_back = ask_for(back, 3)["status"] == "done"
        except LedgerError:  # ends the service, too: at the worst moment
            gone_back = rollback.pending(studio.ledger) is not None
        filler.unlink()
        studio = Studio(root, studio.close(), **settings)
        assert rollback.pending(studio.ledger) is None
        if gone_back:
            assert serves(studio, 3)
        else:
            assert studio.ledger.counts().passes == passes
        studio.train()
        assert studio.save() >= 4
        studio.close()


def serves(studio: Studio, generation: int) -> bool:
    weights = studio.learner.weights
    saved = read_tensors(studio.keeper.history.restore(generation))
    return all(torch.equal(weights.view(name), tensor) for name, tensor in saved)


def test_what_is_replayed_and_fits_no_longer_does_not_hold_up_the_rest(root):
    """training.max_tokens is less than it was, and the one thing to replay between two passes is longer."""
    studio = Studio(root, **QUIET)
    studio.accept("long", [json.dumps({"prompt": " ".join(WORDS[:30]), "completion": " w1"}).encode()])
    studio.train()
    studio.save()
    studio.close()
    studio = Studio(root, **QUIET, training__max_tokens=20)
    studio.accept("new", [b'{"prompt": "w1 w2", "completion": " w3", "passes": 3}'])
    studio.train()
    assert studio.states()["pending"] == 0
    studio.close()


def test_a_line_that_the_tokenizer_refuses_is_set_aside_and_the_rest_is_trained(root):
    studio = Studio(root, **QUIET)
    studio.accept("a", [b'{"text": "w1 poison w2"}', b'{"text": "w1 w2 w3"}'])
    studio.learner.encoder.tokenizer = Refusing(studio.learner.encoder.tokenizer)
    studio.train()
    assert (studio.states()["failed"], studio.states()["trained"]) == (1, 1)
    studio.close()


def test_a_checkpoint_that_cannot_be_made_anew_is_an_error_and_not_tried_for_ever(root, monkeypatch):
    """`current` is damaged, history is whole, and the disk is full."""
    studio = learned(root)
    current = studio.keeper.checkpoints.current()
    with (current / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Sink, "write", full)
    tried, restore = [], studio.keeper.history.restore

    def noted(number):
        tried.append(number)
        assert len(tried) < 10
        return restore(number)

    monkeypatch.setattr(studio.keeper.history, "restore", noted)
    with pytest.raises(CheckpointError, match="No space left"):
        studio.keeper.restore_current()
    assert len(tried) == 1
    studio.close()


def test_a_server_that_wants_a_key_is_asked_now_and_then_and_the_reason_is_kept(root):
    asked = []

    class Locked(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            healthy = self.path == "/health"
            if not healthy:
                asked.append(self.path)
            self.send_response(200 if healthy else 401)
            self.end_headers()

        def log_message(self, *_arguments):
            pass

    studio = Studio(root, **QUIET)
    attachment = studio.attachment()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        attachment.on_session({"url": url}, begins=True)
        for _ in range(20):
            attachment.check(after="attach")
        assert len(asked) == 1
        assert "HOGWILD_API_KEY has to hold its API key" in attachment.unasked
        assert attachment.must_check
        wait_until(lambda: attachment.check(after="attach") or len(asked) > 1, "it is asked again")
        attachment.on_session({"url": url}, begins=True)
        assert attachment.unasked == "", "another server, or the same one anew"
        attachment.check(after="attach")
        assert len(asked) == 3
        server.shutdown()
    status = Status(studio.config, studio.ledger).of(
        studio.learner, attachment.server, 0, Troubles(unasked=attachment.unasked)
    )
    assert any("could not be asked" in one and "401" in one for one in status["warnings"])
    studio.close()


@pytest.mark.parametrize(
    "answers", ["", "[]", '{"data": [{"id": 1}], "choices": [{"index": 0, "prompt_logprobs": null}]}']
)
def test_whoever_answers_at_a_servers_address_cannot_end_the_daemon(root, answers):
    """Nobody can, another program does, or a proxy."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_arguments):
            pass

    studio = Studio(root, **QUIET)
    attachment = studio.attachment()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}" if answers else "http://::1:8000"
        attachment.on_session({"url": url}, begins=True)
        attachment.check(after="attach")
        assert url in attachment.unasked
        assert attachment.must_check
        server.shutdown()
    assert not studio.learner.training
    studio.close()


def test_a_server_that_does_not_answer_is_named(root):
    """It still starts; or it is looked for where it is not."""
    port = free_port()
    studio = Studio(root, server__url=f"http://127.0.0.1:{port}/v1", **QUIET)
    attachment = studio.attachment()
    attachment.on_session({"url": "http://127.0.0.1:8000"}, begins=True)
    attachment.check(after="attach")
    assert attachment.must_check
    status = Status(studio.config, studio.ledger).of(
        studio.learner, attachment.server, 0, Troubles(unasked=attachment.unasked)
    )
    assert any(f"GET http://127.0.0.1:{port}/v1/health is not answered" in one for one in status["warnings"])
    studio.close()


class Refusing:
    """A tokenizer that raises what no caller expects."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __call__(self, text, **options):
        if "poison" in text:
            raise TypeError("TextEncodeInput must be Union[...]")
        return self._real(text, **options)


def test_a_step_that_takes_too_much_memory_is_not_taken_again_after_a_restart(root, monkeypatch):
    """The service ends, as it must; what it was about to learn is set aside, so that it gets on."""
    losses = Trainer._losses

    def small(self, group):
        if torch.is_grad_enabled() and any(len(item.ids) > 30 for item in group):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")
        return losses(self, group)

    monkeypatch.setattr(Trainer, "_losses", small)
    studio = Studio(root, **QUIET)
    studio.accept("long", [json.dumps({"text": " ".join(["w1 w2 w3 w4"] * 10)}).encode()])
    studio.drop("short", 3)
    studio.learner.start()
    wait_until(lambda: studio.learner.failure is not None, "it ends", DEADLINE_S)
    assert isinstance(studio.learner.failure, torch.OutOfMemoryError)
    arena = studio.close()
    studio = Studio(root, arena, **QUIET)
    studio.train()
    assert (studio.states()["failed"], studio.states()["trained"]) == (1, 3)
    studio.close()


def ends(studio: Studio) -> None:
    wait_until(lambda: studio.learner.failure or studio.ledger.is_idle(), "it ends, or is done", DEADLINE_S)


def test_what_is_replayed_and_takes_too_much_memory_costs_no_new_line(root, monkeypatch):
    """It was learned when there was more room. Now it is what goes, and not the short lines that it stands beside."""
    losses = Trainer._losses

    def small(self, group):
        if torch.is_grad_enabled() and any(len(item.ids) > 30 for item in group):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")
        return losses(self, group)

    studio = Studio(root, **QUIET)
    studio.accept("long", [json.dumps({"text": " ".join(["w1 w2 w3 w4"] * 10)}).encode()])
    studio.train()
    arena = studio.close()
    monkeypatch.setattr(Trainer, "_losses", small)
    for restart in range(9):
        studio = Studio(root, arena, **QUIET)
        if not restart:
            studio.drop("short", 3)
        studio.learner.start()
        ends(studio)
        if studio.learner.failure is None:
            break
        arena = studio.close()
    assert (studio.states()["failed"], studio.states()["trained"]) == (0, 3)
    assert [one.file for one in studio.ledger.guards.suspects(9)] == ["long"]
    studio.close()
