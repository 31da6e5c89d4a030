"""What a crash can leave, and what the next start makes of it. Real arenas, ledgers and checkpoints; real kills."""

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hogwild import leftovers, probes, recovery, resume
from hogwild.arena.client import Arena
from hogwild.arena.control import ControlPage
from hogwild.arena.hub import Hub
from hogwild.checkpoint import Checkpoints
from hogwild.curriculum import Curriculum
from hogwild.errors import ArenaError, CheckpointError, ConfigError, VerificationError
from hogwild.examples import parse_line
from hogwild.layout import Source, weight_files
from hogwild.ledger import Ledger, Pass
from hogwild.ledger_records import GoodLine
from hogwild.preparation import Preparation
from hogwild.settings import Config, ProbesConfig, SpoolConfig
from hogwild.spool import Spool
from hogwild.weights import Weights, load_arena
from support import wait_until
from test_permissions import place, unprivileged  # noqa: F401  # `place` is a fixture
from tiny import Child, llama, tokenizer
from world import sums_of

LINE = b'{"text": "w1 w2 w3"}'


class Desk:
    """One state folder and one model, and a daemon's view of them for as long as it is open."""

    def __init__(self, root: Path) -> None:
        self.root, self.state = root, root / "state"
        self.model = llama(root / "model")
        tokenizer(self.model)
        self.config = Config(state_dir=self.state, socket=root / "arena.sock")
        self.open()

    def open(self) -> None:
        self.ledger = Ledger(self.state / "ledger.sqlite")
        self.checkpoints = Checkpoints(self.state / "checkpoints", keep=3)

    def reopen(self) -> None:
        """What a restart of the daemon does."""
        self.ledger.close()
        self.open()

    def take(self, arena: Arena) -> recovery.Taken:
        return recovery.take(arena, self.config, self.ledger, self.checkpoints, Curriculum(self.ledger))

    def accept(self, count: int = 3) -> None:
        good = [GoodLine(i + 1, 0, LINE, parse_line(LINE)) for i in range(count)]
        self.ledger.accept_file("a.jsonl", f"hash-{count}", good, passes=2)

    def train(self, arena: Arena, *, recorded: bool = True) -> None:
        """One step: an update, the page's counter, and (unless a kill comes between) the ledger."""
        arena.control.mark_trained()
        for name in Weights(arena).names:
            Weights(arena).view(name).mul_(1.01)
        arena.control.steps += 1
        if recorded:
            pending = self.ledger.pending(1)[0]
            self.ledger.record_passes(
                [Pass(pending.example_id, 1.0, None, 3, arena.control.steps, 0, arena.control.arena_id)]
            )

    def save(self, arena: Arena) -> Path:
        marker = self.ledger.begin_checkpoint()
        state = {
            "step": arena.control.steps,
            "ledger_position": marker,
            "base_digest": self.ledger.get_meta("base_digest"),
            "source": replace(arena.layout.source).__dict__,
        }
        path = self.checkpoints.save(Weights(arena), self.model, {}, state)
        self.ledger.complete_checkpoint(marker, arena.control.steps, str(path))
        return path

    def filled(self, folder: Path) -> Arena:
        """What a server makes that begins with a checkpoint."""
        arena = load_arena(folder)
        source = Source.of(self.model, weight_files(self.model))
        layout = replace(arena.layout, source=source, checkpoint=str(folder))
        control = ControlPage.create(layout.fingerprint())
        control.generation, control.steps = 1, 2
        return Arena(arena.weights, control, layout)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.ledger.close()


@pytest.fixture
def trained(desk: Desk) -> Arena:
    """An arena with two steps in a checkpoint and one more that only the ledger knows."""
    arena = load_arena(desk.model)
    desk.take(arena)
    desk.accept()
    desk.train(arena)
    desk.train(arena)
    desk.save(arena)
    desk.train(arena)
    return arena


# --- a stale arena ---------------------------------------------------------------------------------------------------


def test_an_arena_of_ours_is_kept_as_it_is(desk, trained):
    before = sums_of(Weights(trained))
    desk.reopen()
    taken = desk.take(trained)
    assert (taken.restored, taken.repeated) == (None, 0)
    assert sums_of(Weights(trained)) == before
    assert desk.ledger.counts().passes == 3


def test_a_models_folder_that_is_not_there_is_named(desk, trained):
    """Its disk is not mounted yet, or it was moved: transformers took the path for a name on the hub."""
    desk.reopen()
    away = desk.model.rename(desk.root / "away")
    with pytest.raises(
        ArenaError, match=f"^{desk.model}, which the server's weights came from, is not there"
    ):
        desk.take(trained)
    away.rename(desk.model)
    assert desk.take(trained).restored is None


def test_steps_that_were_under_way_are_counted_as_repeated(desk, trained):
    for _ in range(desk.config.training.threads):
        desk.train(trained, recorded=False)
    before = sums_of(Weights(trained))
    desk.reopen()
    taken = desk.take(trained)
    assert (taken.restored, taken.repeated) == (None, 2)
    assert sums_of(Weights(trained)) == before
    desk.reopen()
    assert desk.take(trained).repeated == 0, "they are counted once"


def test_an_arena_that_was_trained_further_than_the_ledger_knows_is_written_anew(desk, trained):
    for _ in range(desk.config.training.threads + 1):
        desk.train(trained, recorded=False)
    desk.reopen()
    taken = desk.take(trained)
    current = desk.checkpoints.current()
    assert taken.restored == str(current)
    assert sums_of(Weights(trained)) == sums_of(Weights(load_arena(current)))
    assert desk.ledger.counts().passes == 2, "what is in no checkpoint is queued again"
    desk.reopen()
    assert desk.take(trained).restored is None, "and now it is trusted"


def half_write(pipe: Any, arena: Arena) -> None:
    with arena.control.rewriting():
        weights = Weights(arena)
        for name in weights.names[: len(weights.names) // 2]:
            weights.view(name).fill_(7)
        pipe.send(("half", None))
        pipe.recv()


@pytest.mark.parametrize("saved", [True, False])
def test_an_arena_left_in_the_middle_of_a_restore_is_restored_again(desk, saved):
    """Also when it has never been trained before, and when there is nothing but the model itself to restore."""
    arena = load_arena(desk.model)
    desk.take(arena)
    desk.accept()
    if saved:
        desk.train(arena)
        desk.save(arena)
    expected = sums_of(Weights(arena))
    child = Child(half_write, arena)
    child.hear("half")
    child.kill()
    assert arena.control.restoring
    assert sums_of(Weights(arena)) != expected
    desk.reopen()
    taken = desk.take(arena)
    assert taken.restored == (str(desk.checkpoints.current()) if saved else None)
    assert sums_of(Weights(arena)) == expected
    assert not arena.control.restoring


@pytest.mark.parametrize("saved", [True, False])
def test_killed_between_the_weights_and_the_ledger_the_arena_is_restored_again(desk, monkeypatch, saved):
    """Or else the ledger would count passes that these weights do not hold."""
    first = load_arena(desk.model)
    desk.take(first)
    desk.accept()
    desk.train(first)
    if saved:
        desk.save(first)
        desk.train(first)
    else:
        desk.train(first, recorded=False)  # further than the ledger knows
        desk.train(first, recorded=False)
        desk.train(first, recorded=False)
    second = load_arena(desk.model) if saved else first
    desk.reopen()

    class KilledError(BaseException):
        pass

    def killed(*_arguments):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reset_to_durable", killed)
        with pytest.raises(KilledError):
            desk.take(second)
    desk.reopen()
    desk.take(second)
    assert desk.ledger.counts().passes == int(saved)
    expected = load_arena(desk.checkpoints.current() if saved else desk.model)
    assert sums_of(Weights(second)) == sums_of(Weights(expected))


def test_an_error_in_the_middle_of_a_restore_leaves_the_mark(trained):
    with pytest.raises(OSError, match="disk"), trained.control.rewriting():
        raise OSError("disk")
    assert trained.control.restoring


def test_an_arena_of_another_state_folder_is_refused_and_not_touched(trained, tmp_path):
    before = sums_of(Weights(trained))
    other = Desk(tmp_path / "other")
    with pytest.raises(ArenaError, match="trained by a daemon with another state folder"):
        other.take(trained)
    other.ledger.close()
    assert sums_of(Weights(trained)) == before


# --- a server that began with a checkpoint ---------------------------------------------------------------------------


def test_nothing_is_prepared_for_an_arena_that_is_refused(desk, monkeypatch):
    """It is offered again every few seconds: by and by, all threads and all memory would be at work for it."""
    began, ended, read = threading.Event(), threading.Event(), probes.read

    def write(self: Preparation, path: Path, *_given: Any) -> None:
        if path.parent == desk.state:  # not what another test has left
            began.set()
            wait_until(self._stopped, "it is told to stop", 60)
            ended.set()

    def late(*given: Any) -> Any:
        assert began.wait(60)
        return read(*given)

    monkeypatch.setattr(Preparation, "_write_own_texts", write)
    monkeypatch.setattr(probes, "read", late)
    file = desk.root / "probes.jsonl"
    file.write_bytes(
        b'{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}\n'
    )
    desk.config = desk.config.model_copy(update={"probes": ProbesConfig(file=file)})
    with pytest.raises(ConfigError, match="wrong"):  # the tokenizer has no chat template
        desk.take(load_arena(desk.model))
    assert ended.is_set()


@pytest.mark.usefixtures("trained")
def test_a_server_that_began_with_the_newest_checkpoint_is_taken_without_a_write(desk):
    current = desk.checkpoints.current()
    arena = desk.filled(current)
    before = bytes(arena.weights.mapping)
    taken = desk.take(arena)
    assert taken.restored == str(current)
    assert bytes(arena.weights.mapping) == before
    assert not arena.control.trained, "nothing was written to it"
    assert (arena.control.steps, desk.ledger.counts().passes) == (2, 2)
    desk.reopen()
    assert desk.take(arena).restored == str(current), "a daemon that ended before it trained comes back to it"


@pytest.mark.usefixtures("trained")
def test_a_server_that_does_not_hold_the_checkpoint_it_names_is_refused(desk):
    arena = desk.filled(desk.checkpoints.current())
    name = Weights(arena).names[0]
    Weights(arena).view(name).view(-1)[0] += 1
    with pytest.raises(VerificationError, match=r"1 of .* elements differ") as caught:
        desk.take(arena)
    assert caught.value.problems[0].startswith(name)


@pytest.mark.parametrize("gone", [False, True])
def test_a_server_that_began_with_a_checkpoint_that_is_not_current_any_more_gets_the_current_one(
    desk, trained, gone
):
    """A rollback came between, with no daemon there; `gone`: the checkpoint that it serves has been removed since."""
    older = desk.checkpoints.current()
    arena = desk.filled(older)
    current = desk.save(trained)
    if gone:
        older.rename(desk.root / "removed")
    taken = desk.take(arena)
    assert taken.restored == str(current)
    assert sums_of(Weights(arena)) == sums_of(Weights(trained))


@pytest.mark.usefixtures("trained")
def test_a_server_that_began_with_a_checkpoint_of_another_state_folder_is_refused(desk, tmp_path):
    other = Desk(tmp_path / "other")
    with pytest.raises(VerificationError, match="checkpoint of another state folder"):
        other.take(desk.filled(desk.checkpoints.current()))
    other.ledger.close()


# --- ledger and checkpoints that do not belong together --------------------------------------------------------------


@pytest.mark.usefixtures("trained")
def test_a_ledger_that_is_older_than_the_checkpoint_is_refused(desk):
    desk.ledger.close()
    (desk.state / "ledger.sqlite").rename(desk.root / "away")
    desk.open()
    with pytest.raises(CheckpointError, match="holds passes up to number 2, the ledger knows 0"):
        desk.take(load_arena(desk.model))


@pytest.mark.usefixtures("trained")
def test_a_ledger_without_its_checkpoints_is_refused(desk):
    (desk.state / "checkpoints").rename(desk.root / "away")
    desk.reopen()
    fresh = load_arena(desk.model)
    with pytest.raises(CheckpointError, match="the ledger knows of a checkpoint, but there is none in"):
        desk.take(fresh)
    assert not fresh.control.trained


def test_a_current_that_leads_nowhere_is_refused_with_what_there_is(desk, trained):
    desk.save(trained)
    current = desk.checkpoints.current()
    current.rename(desk.root / "away")
    with pytest.raises(CheckpointError, match=f"leads to {current}, which is not there") as caught:
        desk.take(load_arena(desk.model))
    assert "generation-00000001" in str(caught.value)


def test_a_checkpoint_whose_last_commit_is_missing_counts(desk, trained):
    """Killed between `current` and the ledger: the checkpoint is there, its passes become durable at the next start."""
    arena = load_arena(desk.model)
    marker = desk.ledger.begin_checkpoint()
    desk.checkpoints.save(Weights(trained), desk.model, {}, {"step": 3, "ledger_position": marker})
    assert desk.ledger.durable_marker() < marker
    desk.reopen()
    desk.take(arena)
    assert desk.ledger.durable_marker() == marker
    assert desk.ledger.counts().passes == 3


# --- which weights a server begins with ------------------------------------------------------------------------------


def choose(desk: Desk, model: Path | None = None) -> resume.Start | None:
    folder = model or desk.model
    return resume.choose(desk.state, Source.of(folder, weight_files(folder)))


@pytest.mark.usefixtures("trained")
def test_a_server_begins_with_the_newest_checkpoint_of_its_model(desk, tmp_path):
    assert resume.choose(tmp_path / "no state", Source.of(desk.model, weight_files(desk.model))) is None
    start = choose(desk)
    assert start == resume.Start(desk.checkpoints.current(), 1, 0, 2)


@pytest.mark.usefixtures("trained")
def test_the_same_model_in_other_files_is_recognised_and_another_model_is_not(desk, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in desk.model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert choose(desk, copy) == choose(desk)
    assert choose(desk, llama(tmp_path / "another", seed=1)) is None


def test_a_state_folder_without_a_checkpoint_means_the_model_as_it_came(desk):
    assert choose(desk) is None


@pytest.mark.parametrize("damage", ["state.json", "weights", "current"])
@pytest.mark.usefixtures("trained")
def test_a_checkpoint_that_cannot_be_used_is_an_error_not_the_model_as_it_came(desk, damage):
    current = desk.checkpoints.current()
    if damage == "current":
        current.rename(desk.root / "away")
    elif damage == "weights":
        data = bytearray((current / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (current / "model.safetensors").write_bytes(data)
    else:
        (current / "hogwild" / "state.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=str(current)):
        choose(desk)


def test_a_state_folder_that_may_not_be_read_is_an_error_too(place):  # noqa: F811
    desk = Desk(place)
    desk.ledger.close()
    desk.state.chmod(0o700)
    for path in desk.model.iterdir():
        path.chmod(0o644)
    if os.geteuid() != 0:
        desk.state.chmod(0)
    said = unprivileged(lambda: choose(desk))
    assert f"{desk.state}/checkpoints cannot be looked at by user" in said


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_temporary_files_of_ours_are_removed_and_nothing_else(tmp_path):
    state, spool = tmp_path / "state", tmp_path / "spool"
    ours = [state / "status.tmp", spool / "failed" / ".a.jsonl.errors.jsonl.tmp"]
    theirs = [
        state / "status.json",
        spool / "incoming" / ".b.jsonl.tmp",
        spool / "incoming" / "c.jsonl.tmp",
        spool / "failed" / "a.jsonl.errors.jsonl",
    ]
    for path in (*ours, *theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert leftovers.sweep(state, spool) == ours
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert leftovers.sweep(tmp_path / "none", tmp_path / "none") == []


def test_a_socket_that_may_not_be_connected_to_is_not_taken_for_a_stale_one(place):  # noqa: F811
    """Somebody else's daemon, alive: its socket is in a folder where we may remove files."""
    path = place / "arena.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        path.chmod(0 if os.geteuid() else 0o600)
        said = unprivileged(
            lambda: Hub(
                path, lambda _arena: None, lambda _server, _begins: None, lambda _name, _arguments: {}
            )
        )
        assert f"cannot listen on {path}" in said
        assert "Permission denied" in said
        assert path.exists()


def test_a_daemon_whose_backlog_is_full_is_not_taken_for_a_stale_one(tmp_path):
    path = tmp_path / "arena.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ArenaError, match="another daemon listens on"):
            Hub(path, lambda _arena: None, lambda _server, _begins: None, lambda _name, _arguments: {})


# --- half-moved files ------------------------------------------------------------------------------------------------


def test_a_file_that_was_on_its_way_comes_back_and_is_taken_once(desk):
    """Killed between the two renames: it may be one that nobody has read, so it is read."""
    config = SpoolConfig(dir=desk.root / "spool", settle_s=0)
    spool = Spool(config, desk.ledger, passes=1)
    spool.prepare()
    moving = desk.root / "spool" / ".moving"
    (moving / "new.jsonl").write_bytes(LINE + b"\n")
    (moving / "taken.jsonl").write_bytes(b'{"text": "old"}\n')
    (spool.incoming / "taken.jsonl").write_bytes(b'{"text": "w4"}\n')  # a third one has come to the old place
    again = Spool(config, desk.ledger, passes=1)
    again.prepare()
    assert not list(moving.iterdir())
    again.scan_once()
    assert {path.name for path in again.done.iterdir()} == {"new.jsonl", "taken.jsonl", "again-taken.jsonl"}
    assert desk.ledger.counts().files == 3
