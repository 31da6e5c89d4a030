"""History on a real disk: every generation comes back bit for bit, and damage is found, named and walked around."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hogwild import delta, generation, history_read, history_report
from hogwild.checkpoint import Checkpoints
from hogwild.errors import CheckpointError, UsageError
from hogwild.files import PIECE, Sink
from hogwild.history import History
from hogwild.history_nodes import BASE, BLOBS, DELTA, ENTRY, INDEX, load
from hogwild.settings import HistoryConfig
from hogwild.tensor_file import read_header
from hogwild.weights import Weights, load_arena
from support import digest, environment
from tiny import Child, llama, tokenizer


class World:
    """A tiny model whose weights and moments move at random, and everything that was ever saved of it."""

    def __init__(self, root: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: Any) -> None:
        self.root, self.random = root, random.Random(seed)
        self.base = llama(root / "model", dtype)
        tokenizer(self.base)
        self.weights = Weights(load_arena(self.base))
        self.generator = torch.Generator().manual_seed(seed)
        self.moments: dict[str, torch.Tensor] = {}
        self.step = 0
        self.saved: dict[int, dict[str, str]] = {}
        self.keep, self.config = 2, HistoryConfig(**{"base_every": 5, **config})
        self.open()

    def open(self) -> "World":
        """As a daemon does when it starts."""
        self.checkpoints = Checkpoints(self.root / "checkpoints", self.keep)
        self.history = History(self.root / "history", self.checkpoints, self.config)
        return self

    def train(self) -> None:
        """A few elements of a few tensors, as training at a low rate would; now and then nothing at all."""
        self.step += 1
        for name in self.random.sample(self.weights.names, self.random.randrange(len(self.weights.names))):
            view = self.weights.view(name)
            mask = torch.rand(view.shape, generator=self.generator) < 0.3
            view.add_((mask * torch.randn(view.shape, generator=self.generator) * 0.01).to(view.dtype))
            if "proj" in name:
                self.moments[f"{name}/exp_avg"] = torch.randn(17, 5, generator=self.generator)
                self.moments[f"{name}/counts"] = torch.tensor([self.step, 0])

    def save(self, *, record: bool = True) -> int:
        state = {"step": self.step, "epoch": self.step, "ledger_position": 10 * self.step,
                 "base_path": str(self.base), "base_digest": None, "trained": {}}  # fmt: skip
        folder = self.checkpoints.save(self.weights, self.base, self.moments, state)
        number = generation.number(folder)
        assert number is not None
        self.saved[number] = files(folder)
        if record:
            self.history.record()
            self.checkpoints.prune(self.history.may_go)
            self.history.prune()
        return number

    def run(self, count: int) -> None:
        for _ in range(count):
            self.train()
            self.save()

    def back_to(self, number: int) -> None:
        """What a rollback does on disk and in the arena."""
        self.weights.write(self.history.restore(number))
        self.moments = load_file(self.checkpoints.folders()[number] / generation.OPTIMIZER)
        self.checkpoints.point_current_at(number)

    def assert_exact(self, number: int) -> None:
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        self.history.export(number, out)
        assert files(out) == self.saved[number], f"generation {number}"

    def forget_folders(self, *stay: int) -> None:
        """Complete folders go, so that only history is left."""
        for number, folder in self.checkpoints.folders().items():
            if number not in (*stay, self.checkpoints.current_generation()):
                shutil.rmtree(folder)


def files(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    return {
        str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def flip(path: Path, seed: int = 0) -> None:
    """One bit, somewhere."""
    data = bytearray(path.read_bytes())
    where = random.Random(f"{path.name}{seed}").randrange(len(data))
    data[where] ^= 1 << (where % 8)
    path.write_bytes(data)


def test_every_generation_of_a_long_random_run_comes_back_bit_for_bit(tmp_path):
    """Also those on a branch that was rolled back, and generation 0."""
    world = World(tmp_path, base_every=7)
    world.run(12)
    world.back_to(5)
    world.run(6)
    world.back_to(15)
    world.run(6)
    assert len(world.checkpoints.folders()) <= 4
    assert sorted(world.saved) == list(range(1, 25))
    for number in world.saved:
        world.assert_exact(number)
    out = tmp_path / "zero"
    world.history.export(0, out)
    for path in world.base.iterdir():
        assert digest(out / path.name) == digest(path)
    assert load_file(out / generation.OPTIMIZER) == {}
    assert not world.history.broken


# --- damage ----------------------------------------------------------------------------------------------------------


def refusal(world: World, number: int) -> str:
    """Why a generation cannot be restored; empty if it can, and is exact."""
    try:
        world.assert_exact(number)
    except CheckpointError as error:
        return str(error)
    return ""


def ways(world: World) -> list[Path]:
    """Every file that history consists of."""
    return sorted(path for path in world.history.root.rglob("*") if path.is_file())


def test_damage_to_any_file_is_found_and_what_does_not_need_it_comes_back_exactly(tmp_path):
    """One bit of each file in turn. A generation comes back exactly, or is refused by name with a good one to go to."""
    world = World(tmp_path, base_every=3)
    world.run(5)
    world.forget_folders()
    lost: dict[str, list[int]] = {}
    for path in ways(world):
        content = path.read_bytes()
        if not content:
            continue  # a delta without a frame: nothing was trained
        flip(path)
        world.open()
        for number in world.saved:
            error = refusal(world, number)
            if error:
                lost.setdefault(str(path.relative_to(world.history.root)), []).append(number)
                assert f"generation {number} cannot be restored" in error
                assert generation.name(number) in error
                good = world.history.last_good(number)
                assert good is not None
                assert good < number
                assert f"generation {good}" in error
                assert good == 0 or not refusal(world, good)
        path.write_bytes(content)
    own = {
        f"{generation.name(number)}/{name}": [number]
        for number in world.saved
        for name in (DELTA, ENTRY, INDEX)
    }
    for file, numbers in lost.items():
        if file in own:
            assert numbers == own[file], "a damaged difference costs its own generation and no other"
        elif "state.json" in file:
            assert numbers == [generation.number(Path(file).parent)]
        else:
            raise AssertionError(f"{file} costs {numbers}; full bases and blobs are to be had elsewhere")
    assert set(own) & set(lost)
    world.open()
    for number in world.saved:
        world.assert_exact(number)


def test_what_is_said_of_damage_does_not_repeat_the_file(tmp_path):
    """A bit in the middle of its text, which is no UTF-8 any more: of a large model that is megabytes of one line."""
    world = World(tmp_path, base_every=0)
    world.run(5)
    world.forget_folders()
    index = world.history.root / generation.name(3) / INDEX
    weights = world.checkpoints.folders()[5] / "model.safetensors"
    for path in (index, weights):
        data = bytearray(path.read_bytes())
        data[300] |= 0x80
        path.write_bytes(data)
    said = refusal(world.open(), 3)
    with pytest.raises(CheckpointError) as caught:
        read_header(weights)
    for path, error in ((index, said), (weights, str(caught.value))):
        assert "UnicodeDecodeError" in error
        assert str(path) in error
        assert len(error) < 1500


def test_what_is_forgotten_while_somebody_lists_it_is_no_error(tmp_path, monkeypatch):
    world = World(tmp_path)
    world.run(4)

    def load_and_forget(*arguments):
        found = load(*arguments)
        shutil.rmtree(world.history.root / generation.name(1))
        shutil.rmtree(world.checkpoints.folders()[3])
        return found

    monkeypatch.setattr(history_report, "load", load_and_forget)
    records = {record["generation"]: record for record in history_report.listing(tmp_path)}
    assert [records[1]["bytes"], records[3]["folder_bytes"]] == [0, 0]
    assert records[2]["bytes"] > 0


def test_damage_that_a_command_walks_around_is_said_beside_its_answer(tmp_path):
    world = World(tmp_path, base_every=5)
    world.run(9)
    world.forget_folders()
    flip(world.history.root / generation.name(5) / BASE)
    ran = subprocess.run(
        [sys.executable, "-m", "hogwild", "diff", "5", "6", "--json"],
        env=environment(HOGWILD_STATE_DIR=str(tmp_path)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"layer", "change"} <= json.loads(ran.stdout)[0].keys()
    assert [json.loads(line)["event"] for line in ran.stderr.splitlines()] == ["history.damaged"]


@pytest.mark.parametrize("what", [DELTA, BASE, ENTRY, INDEX, "state.json", "."])
def test_a_missing_link_is_walked_around(tmp_path, what):
    """Generation 5 is a full base in the middle; what needs only its neighbours does not mind that it is gone."""
    world = World(tmp_path, base_every=5)
    world.run(9)
    world.forget_folders()
    entry = world.history.root / generation.name(5)
    shutil.rmtree(entry) if what == "." else (entry / what).unlink()
    world.open()
    for number in world.saved:
        if number == 5 and what != BASE:
            with pytest.raises(CheckpointError, match="generation 5"):
                world.assert_exact(5)
            assert world.history.last_good(5) == 4
        else:
            world.assert_exact(number)


def test_a_damaged_checkpoint_folder_is_made_anew_from_history(tmp_path):
    world = World(tmp_path)
    world.run(4)
    folder = world.checkpoints.folders()[4]
    flip(folder / "model.safetensors")
    made = world.open().history.restore(4)
    assert files(made) == world.saved[4]
    shutil.rmtree(folder)
    assert world.open().history.restore(4) == folder
    assert files(folder) == world.saved[4]


def test_the_model_as_it_came_may_be_gone(tmp_path):
    """Its own bits follow from the first generation."""
    world = World(tmp_path)
    world.run(3)
    before = {path.name: digest(path) for path in world.base.iterdir()}
    shutil.rmtree(world.base)
    out = tmp_path / "zero"
    world.open().history.export(0, out)
    assert {path.name: digest(path) for path in out.iterdir() if path.is_file()} == before


def test_a_model_that_was_changed_under_our_feet_is_not_taken_for_generation_0(tmp_path):
    world = World(tmp_path)
    world.run(2)
    before = digest(world.base / "model.safetensors")
    flip(world.base / "model.safetensors")
    out = tmp_path / "zero"
    world.open().history.export(0, out)
    assert digest(out / "model.safetensors") == before
    assert ("model", 0) in world.history.broken


def test_a_model_that_the_server_casts_is_stored_whole_once(tmp_path):
    """fp32 files served in bf16: nothing to combine the first generation with."""
    world = World(tmp_path, dtype=torch.float32)
    tensors = load_file(world.base / "model.safetensors")
    cast = tmp_path / "cast"
    shutil.copytree(world.base, cast)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, cast / "model.safetensors")
    world.weights = Weights(load_arena(cast))
    world.run(6)
    world.forget_folders()
    for number in world.open().saved:
        world.assert_exact(number)


# --- retention -------------------------------------------------------------------------------------------------------


def kept(world: World) -> list[int]:
    return sorted(number for number in generation.numbered(world.history.root) if number)


def test_the_newest_are_kept_and_all_of_them_can_be_restored(tmp_path):
    world = World(tmp_path, keep=4, base_every=3)
    for _ in range(12):
        world.run(1)
        for number in kept(world):
            world.assert_exact(number)
    assert kept(world) == [9, 10, 11, 12]


def test_what_others_need_stays_until_they_go(tmp_path):
    """A branch that was rolled back hangs on the generation that it left from."""
    world = World(tmp_path, keep=4, base_every=0)
    world.run(6)
    world.back_to(3)
    for _ in range(8):
        world.run(1)
        for number in kept(world):
            world.assert_exact(number)
    assert kept(world) == [11, 12, 13, 14]


def test_age_and_space(tmp_path):
    world = World(tmp_path, base_every=0)
    world.run(6)
    sizes = {number: node.nbytes for number, node in world.history.nodes().items()}
    limit = sum(sizes[number] for number in (4, 5, 6)) + sizes[3] // 2
    world.config = HistoryConfig(base_every=0, max_gib=limit / 2**30)
    world.open().history.prune()
    assert kept(world) == [4, 5, 6]
    world.config = HistoryConfig(base_every=0, max_age_s=0.001)
    time.sleep(1.1)  # times are to the second
    world.open().history.prune()
    assert kept(world) == [6], "the current one is never forgotten"
    for number in (6,):
        world.assert_exact(number)
    used = {
        name for node in world.history.nodes().values() if node.entry for name in node.entry.blobs.values()
    }
    assert {path.name for path in (world.history.root / BLOBS).iterdir()} == used


def test_a_clock_that_is_far_ahead_for_a_while_makes_nothing_old(tmp_path, monkeypatch):
    """Set ten years ahead while the daemon runs, and put right again; then two hours pass."""
    world = World(tmp_path, base_every=0, max_age_s=3600)
    world.run(3)
    real, since_boot = time.time, time.clock_gettime
    years = 10 * 365 * 86400
    with monkeypatch.context() as ahead:
        ahead.setattr("time.time", lambda: real() + years)
        ahead.setattr(
            "hogwild.checkpoint.now", lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time()))
        )
        world.run(2)
        assert kept(world) == [1, 2, 3, 4, 5]
    world.run(2)
    assert kept(world) == [1, 2, 3, 4, 5, 6, 7]
    monkeypatch.setattr("time.time", lambda: real() + 7200)
    monkeypatch.setattr("time.clock_gettime", lambda clock: since_boot(clock) + 7200)
    world.history.prune()
    assert not {1, 2, 3} & set(kept(world)), "which the time that has passed does"


def test_a_folder_that_history_does_not_hold_is_not_pruned(tmp_path):
    """Recording failed (a full disk, a kill): the complete folders stay until it has caught up."""
    world = World(tmp_path)
    for _ in range(4):
        world.train()
        world.save(record=False)
        world.checkpoints.prune(world.history.may_go)
    assert sorted(world.checkpoints.folders()) == [1, 2, 3, 4]
    assert [one.generation for one in world.open().history.record()] == [1, 2, 3, 4]
    world.checkpoints.prune(world.history.may_go)
    assert sorted(world.checkpoints.folders()) == [3, 4]
    for number in world.saved:
        world.assert_exact(number)


def test_history_can_be_switched_off(tmp_path):
    world = World(tmp_path, keep=0)
    world.run(4)
    assert sorted(world.checkpoints.folders()) == [3, 4]
    assert kept(world) == []
    world.assert_exact(3)


def test_who_asks_for_the_model_as_it_came_too_early_is_told_to_wait(tmp_path):
    world = World(tmp_path)
    world.save(record=False)
    with pytest.raises(CheckpointError, match=r"no generation 0 .* some seconds after the first checkpoint"):
        world.history.export(0, tmp_path / "early")
    world.history.record()
    world.history.export(0, tmp_path / "later")


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    """What an interrupted one left is no reason to refuse the next; what is somebody's is."""
    world = World(tmp_path)
    world.run(2)
    out = tmp_path / "out"
    read = history_read.Reader.read

    def interrupted(*_):
        assert not (out / "config.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(history_read.Reader, "read", interrupted)
    shutil.rmtree(world.checkpoints.folders()[1])
    with pytest.raises(KeyboardInterrupt):
        world.history.export(1, out)
    assert not out.exists()

    def export(pipe):
        monkeypatch.setattr(
            history_read.Reader, "read", lambda *_: pipe.send(("reading", None)) or time.sleep(600)
        )
        world.history.export(1, out)

    killed = Child(export)
    killed.hear("reading")
    monkeypatch.setattr(history_read.Reader, "read", read)
    with pytest.raises(UsageError, match="is being written by another process"):
        world.history.export(1, out)
    killed.kill()
    assert list(out.iterdir()), "what it was killed in"
    world.history.export(1, out)
    assert files(out) == world.saved[1]
    with pytest.raises(UsageError, match="is not empty"):
        world.history.export(1, out)
    assert files(out) == world.saved[1]


# --- crashes and full disks ------------------------------------------------------------------------------------------


def recording(pipe: Any, root: Path, fatal: int) -> None:
    """Record what is missing, and die just before the `fatal`-th call that changes what is on disk."""
    checkpoints = Checkpoints(root / "checkpoints", 2)
    history = History(root / "history", checkpoints, HistoryConfig(base_every=2, keep=2))
    calls = 0

    def audit(event: str, arguments: Any) -> None:
        nonlocal calls
        writes = event == "open" and arguments[2] & os.O_ACCMODE
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    history.record()
    checkpoints.prune(history.may_go)
    history.prune()
    pipe.send(("survived", calls))


def test_killed_anywhere_history_is_consistent_and_catches_up(tmp_path):
    world = World(tmp_path / "world", base_every=2, keep=2)
    world.run(2)
    for _ in range(2):
        world.train()
        world.save(record=False)
    first = tmp_path / "first"
    shutil.copytree(world.root, first, symlinks=True)

    def attempt(fatal: int) -> int:
        shutil.rmtree(world.root)
        shutil.copytree(first, world.root, symlinks=True)
        child = Child(recording, world.root, fatal)
        child.process.join()
        calls = child.hear("survived") if child.process.exitcode == 0 else 0
        for number in world.open().history.nodes():
            if number:
                world.assert_exact(number)
        world.history.record()
        world.checkpoints.prune(world.history.may_go)
        world.history.prune()
        assert kept(world) == [3, 4]
        for number in (3, 4):
            world.assert_exact(number)
        assert not list(world.history.root.rglob(".unfinished*"))
        return calls

    total = attempt(10**9)
    for fatal in range(1, total + 1, max(total // 12, 1)):
        assert not attempt(fatal)


def test_a_full_disk_costs_the_entry_and_nothing_else(tmp_path):
    world = World(tmp_path)
    world.run(2)
    world.train()
    world.save(record=False)

    def limited(pipe: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
        try:
            world.history.record()
        except CheckpointError as error:
            pipe.send(("said", str(error)))

    said = Child(limited).hear("said")
    assert "generation-00000003 could not be recorded" in said
    assert "File too large" in said
    assert kept(world.open()) == [1, 2]
    world.history.record()
    for number in world.saved:
        world.assert_exact(number)


# --- one tensor ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    itemsize=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(0, 3000) | st.sampled_from([PIECE // 4, PIECE // 4 + 1]),
    linked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_tensor_comes_back_whatever_its_bits(tmp_path, itemsize, count, linked, seed):
    chance = np.random.default_rng(seed)
    new = chance.integers(0, 256, count * itemsize, np.uint8)
    old = (
        new ^ (chance.random(len(new)) < 0.1) * chance.integers(0, 256, len(new), np.uint8)
        if linked
        else None
    )
    path = tmp_path / f"{itemsize}-{count}-{linked}-{seed}"
    path.unlink(missing_ok=True)
    sink = Sink(path)
    sink.write(b"before")
    lengths = delta.encode(sink, new, old, itemsize)
    sink.close()
    got = np.zeros(len(new), np.uint8) if old is None else old.copy()
    fd = os.open(path, os.O_RDONLY)
    try:
        delta.decode_into(got, fd, 6, lengths, itemsize)
        assert np.array_equal(got, new)
        if lengths:
            with pytest.raises(delta.DamagedError):
                delta.decode_into(got, fd, 7, lengths, itemsize)
    finally:
        os.close(fd)
        path.unlink()
