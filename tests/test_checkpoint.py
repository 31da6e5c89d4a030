"""Checkpoints on a real disk: complete, atomic under kill -9, and honest about what could not be written."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hogwild import generation
from hogwild.arena.client import Arena
from hogwild.checkpoint import Checkpoints, folder_bytes, read_optimizer, read_state
from hogwild.errors import CheckpointError
from hogwild.files import paced, rest
from hogwild.weights import Weights, load_arena, read_tensors
from test_permissions import unprivileged
from tiny import Child, llama, tokenizer

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = llama(tmp_path / "model", torch.bfloat16)
    tokenizer(folder)
    return folder


@pytest.fixture
def weights(base: Path) -> Weights:
    return Weights(load_arena(base))


def optimizer(step: int) -> dict[str, torch.Tensor]:
    return {f"{UP}/exp_avg": torch.full((48, 8), float(step)), "x/counts": torch.tensor([step, 0])}


def save(checkpoints: Checkpoints, weights: Weights, base: Path, step: int) -> Path:
    """Save, and let go of what is too old."""
    state = {"step": step, "epoch": step + 1, "ledger_position": step * 10}
    saved = checkpoints.save(weights, base, optimizer(step), state)
    checkpoints.prune()
    return saved


def assert_complete(folder: Path, base: Path) -> int:
    """The checkpoint has every file of the model, whole, and of one step; returns the step."""
    step = int(generation.verify(folder)["step"])
    assert float(read_optimizer(folder)[f"{UP}/exp_avg"][0, 0]) == step
    names = {name for name, _ in read_tensors(base)}
    assert {name for name, _ in read_tensors(folder)} == names
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    return step


def test_a_checkpoint_is_a_model_that_transformers_loads_and_equals_the_arena(tmp_path, weights, base):
    for name in weights.names:
        weights.view(name).add_(0.25)
    saved = save(Checkpoints(tmp_path / "c", keep=3), weights, base, 7)
    assert saved == tmp_path / "c" / "generation-00000001"
    assert (tmp_path / "c" / "current").resolve() == saved
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "current")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(weights.names)
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, weights.view(name)), name
    assert (
        AutoTokenizer.from_pretrained(saved)("w3 w4")["input_ids"]
        == AutoTokenizer.from_pretrained(base)("w3 w4")["input_ids"]
    )
    state = read_state(saved)
    assert {key: state[key] for key in ("generation", "parent", "step", "epoch", "ledger_position")} == {
        "generation": 1, "parent": 0, "step": 7, "epoch": 8, "ledger_position": 70,
    }  # fmt: skip
    assert set(state["checksums"]) == {
        str(path.relative_to(saved))
        for path in saved.rglob("*")
        if path.is_file() and path.name != "state.json"
    }
    for name, tensor in read_optimizer(saved).items():
        assert torch.equal(tensor, optimizer(7)[name])
    assert_complete(saved, base)


def test_another_user_may_read_it(tmp_path, weights, base):
    saved = save(Checkpoints(tmp_path / "c", keep=3), weights, base, 1)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in saved.rglob("*") if path.is_file())


def test_what_is_not_served_comes_from_the_base_model(tmp_path, weights, base):
    held = load_file(base / "model.safetensors")
    layout = weights.arena.layout
    tensors = {name: region for name, region in layout.tensors.items() if name != UP}
    partly = Weights(Arena(weights.arena.weights, weights.arena.control, replace(layout, tensors=tensors)))
    weights.view(UP).zero_()
    saved = save(Checkpoints(tmp_path / "c", keep=3), partly, base, 1)
    assert torch.equal(load_file(saved / "model.safetensors")[UP], held[UP])


def test_strided_views_and_two_names_for_one_region_are_saved(tmp_path, weights, base):
    """Fused projections are contiguous rows; a transposed one and a head tied at load are not that simple."""
    arena = weights.arena
    up, norm = arena.layout.tensors[UP], arena.layout.tensors["model.norm.weight"]
    tensors = {
        **arena.layout.tensors,
        UP: replace(up, stride=(1, 48)),
        "model.layers.0.input_layernorm.weight": norm,
    }
    turned = Weights(Arena(arena.weights, arena.control, replace(arena.layout, tensors=tensors)))
    saved = save(Checkpoints(tmp_path / "c", keep=3), turned, base, 1)
    held = load_file(saved / "model.safetensors")
    assert torch.equal(held[UP], turned.view(UP))
    assert torch.equal(held["model.layers.0.input_layernorm.weight"], held["model.norm.weight"])


def test_a_sharded_model_stays_sharded(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="10KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    (sharded / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    weights = Weights(load_arena(sharded))
    for name in weights.names:
        weights.view(name).mul_(2)
    saved = save(Checkpoints(tmp_path / "c", keep=3), weights, sharded, 3)
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert {path.name for path in saved.glob("*.safetensors")} == files
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(saved / file)[name], weights.view(name))
    for name, parameter in AutoModelForCausalLM.from_pretrained(saved).named_parameters():
        assert torch.equal(parameter, weights.view(name)), name


def test_every_element_is_a_value_that_it_had_while_another_thread_writes(tmp_path, base):
    """No lock, no pause: an element is the old or the new value, never a mixture of their bytes."""
    weights = Weights(load_arena(base))
    values = torch.tensor([0x3F80, 0x4049, 0x7F7F, 0x0101], dtype=torch.int16).view(torch.bfloat16)
    names = weights.names
    for name in names:
        weights.view(name).fill_(values[0])
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            for name in names:
                weights.view(name).fill_(values[written % 4])
            written += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        checkpoints = Checkpoints(tmp_path / "c", keep=1)
        for step in range(5):
            before = written
            saved = save(checkpoints, weights, base, step)
            for name, tensor in read_tensors(saved):
                assert bool(torch.isin(tensor.view(torch.int16), values.view(torch.int16)).all()), name
            while written == before:
                time.sleep(0.001)
    finally:
        stop.set()
        writer.join()


# --- which ones are kept -------------------------------------------------------------------------------------------


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name not in ("current", "last-generation"))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, weights, base, keep):
    checkpoints = Checkpoints(tmp_path / "c", keep)
    for step in range(1, 6):
        save(checkpoints, weights, base, step)
    assert kept(tmp_path / "c") == [f"generation-0000000{number}" for number in range(6 - keep, 6)]
    assert checkpoints.current() == tmp_path / "c" / "generation-00000005"


@pytest.mark.parametrize("keep", [1, 2])
def test_the_current_one_is_never_pruned_also_under_a_linked_folder(tmp_path, weights, base, keep):
    """systemd's DynamicUser makes /var/lib/<name> a symbolic link."""
    (tmp_path / "private").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "private")
    checkpoints = Checkpoints(tmp_path / "state" / "c", keep)
    for step in (1, 2, 2, 3, 3):
        save(checkpoints, weights, base, step)
        current = checkpoints.current()
        assert current is not None
        assert assert_complete(current, base) == step
    assert len(kept(tmp_path / "private" / "c")) == keep


def test_a_save_without_training_in_between_is_a_generation_of_its_own(tmp_path, weights, base):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for value in (1.0, 2.0, 3.0):
        weights.view(UP).fill_(value)
        saved = save(checkpoints, weights, base, 4)
        assert checkpoints.current() == saved
        assert bool((load_file(saved / "model.safetensors")[UP] == value).all())
    assert kept(tmp_path / "c") == ["generation-00000002", "generation-00000003"]
    assert [read_state(folder)["parent"] for folder in checkpoints.folders().values()] == [1, 2]


def test_a_number_is_never_used_again_and_the_parent_is_what_was_current(tmp_path, weights, base):
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    for step in (10, 20, 30):
        save(checkpoints, weights, base, step)
    checkpoints.point_current_at(1)
    checkpoints.keep = 1
    assert checkpoints.prune() == [3, 2]
    saved = save(Checkpoints(tmp_path / "c", keep=9), weights, base, 11)
    assert saved.name == "generation-00000004"
    assert read_state(saved)["parent"] == 1


def test_age_and_space_let_old_ones_go_but_never_the_current_one(tmp_path, weights, base):
    checkpoints = Checkpoints(tmp_path / "c", keep=9)
    for step in range(1, 5):
        saved = save(checkpoints, weights, base, step)
    nbytes = folder_bytes(saved)
    checkpoints.max_bytes = 3 * nbytes + nbytes // 2
    assert checkpoints.prune() == [1]
    os.utime(tmp_path / "c" / "generation-00000002", (1, 1))
    checkpoints.max_age_s = 3600.0
    assert checkpoints.prune() == [2]
    os.utime(saved, (1, 1))
    checkpoints.max_bytes = 1
    assert checkpoints.prune(lambda _number, _folder: False) == [], "what nothing else holds stays"
    assert checkpoints.prune() == [3]
    assert checkpoints.current() == saved
    assert_complete(saved, base)


def test_a_clock_that_is_set_ahead_makes_no_folder_old(tmp_path, weights, base, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", keep=9, max_age_s=3600)
    for step in range(1, 4):
        save(checkpoints, weights, base, step)
    ahead = time.time() + 10 * 365 * 86400
    monkeypatch.setattr("time.time", lambda: ahead)
    assert checkpoints.prune() == []


def test_no_checkpoint_yet(tmp_path):
    assert Checkpoints(tmp_path / "c", keep=2).current() is None


# --- crashes -------------------------------------------------------------------------------------------------------


def saving_forever(pipe: Any, root: Path, base: Path, steps: list[int]) -> None:
    weights = Weights(load_arena(base))
    checkpoints = Checkpoints(root, keep=2)
    pipe.send(("started", None))
    while True:
        for step in steps:
            save(checkpoints, weights, base, step)


@pytest.mark.parametrize("steps", [[1, 2, 3, 4, 5], [7]], ids=["ascending", "nothing was trained"])
def test_current_is_whole_wherever_the_writer_is_killed(tmp_path, base, steps):
    """SIGKILL at 15 random moments of a loop of saves; whatever a moment leaves, `current` can be loaded."""
    root = tmp_path / "c"
    save(Checkpoints(root, keep=2), Weights(load_arena(base)), base, steps[0])
    chance = random.Random(1)
    for _ in range(15):
        child = Child(saving_forever, root, base, steps)
        child.hear("started")
        time.sleep(chance.random() * 0.06)
        child.kill()
        assert assert_complete((root / "current").resolve(strict=True), base) in steps
        for path in root.glob("generation-*"):
            assert_complete(path, base)
        checkpoints = Checkpoints(root, keep=2)
        assert not [
            path
            for path in root.iterdir()
            if not path.name.startswith(("generation-", "current", "last-generation"))
        ]
        assert checkpoints.current() is not None


def killed_at(pipe: Any, root: Path, base: Path, step: int, fatal: int) -> None:
    """Save once, and die by SIGKILL just before the `fatal`-th system call that changes a name."""
    weights = Weights(load_arena(base))
    checkpoints = Checkpoints(root, keep=1)
    calls = 0

    def audit(event: str, _arguments: Any) -> None:
        nonlocal calls
        if event in ("os.rename", "os.remove", "os.rmdir", "os.symlink", "os.mkdir", "shutil.rmtree"):
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1

    sys.addaudithook(audit)
    save(checkpoints, weights, base, step)
    pipe.send(("survived", calls))


@pytest.mark.parametrize("step", [1, 2], ids=["nothing was trained", "the next step"])
def test_current_is_whole_after_a_kill_at_each_change_of_a_name(tmp_path, base, step):
    """The moments that a random kill seldom meets."""
    first = tmp_path / "first"
    save(Checkpoints(first, keep=1), Weights(load_arena(base)), base, 1)
    for fatal in range(60):
        root = tmp_path / "c"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first, root, symlinks=True)
        child = Child(killed_at, root, base, step, fatal)
        child.process.join()
        current = (root / "current").resolve(strict=True)
        assert assert_complete(current, base) in (1, step), fatal
        for path in root.glob("generation-*"):
            assert_complete(path, base)
        assert Checkpoints(root, keep=1).current() == current
        if child.process.exitcode == 0:
            assert fatal > 6, "the sweep met the calls it is about"
            assert kept(root) == [current.name]
            return
    raise AssertionError("the save never came to its end")


def test_leftovers_of_an_interrupted_write_are_cleared(tmp_path, weights, base):
    root = tmp_path / "c"
    saved = save(Checkpoints(root, keep=3), weights, base, 1)
    shutil.copytree(saved, root / ".unfinished-generation-00000002")
    (root / ".unfinished-current").symlink_to("generation-00000009")
    (root / ".unfinished-file").write_text("x")
    (root / "notes.txt").write_text("the operator's own")
    assert Checkpoints(root, keep=3).current() == saved
    assert kept(root) == ["generation-00000001", "notes.txt"]


# --- failures ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, kib: int):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(tmp_path, weights, base):
    whole = save(Checkpoints(tmp_path / "elsewhere", keep=1), weights, base, 1)
    pages = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", pages * 4 * 3 // 2):
        root = tmp_path / "disk" / "c"
        checkpoints = Checkpoints(root, keep=3)
        saved = save(checkpoints, weights, base, 1)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=str(root / "generation-00000002")) as caught:
                save(checkpoints, weights, base, 2)
            assert "No space left" in str(caught.value)
            assert checkpoints.current() == saved
            assert_complete(saved, base)
            assert kept(root) == ["generation-00000001"], "what was half-written does not keep the disk full"


def test_a_file_size_limit_keeps_the_previous_checkpoint(tmp_path, base):
    """Needs no root: a limit of 20 kB on every file that is written."""
    root = tmp_path / "c"
    saved = save(Checkpoints(root, keep=3), Weights(load_arena(base)), base, 1)

    def limited(pipe: Any) -> None:
        weights = Weights(load_arena(base))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(Checkpoints(root, keep=3), weights, base, 2)
        except CheckpointError as error:
            pipe.send(("said", str(error)))

    said = Child(limited).hear("said")
    assert str(root / "generation-00000002") in said
    assert "File too large" in said
    assert kept(root) == ["generation-00000001"]
    assert_complete(saved, base)


def test_a_folder_that_may_not_be_written_is_named_with_the_user():
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        base = llama(Path(place) / "model", torch.bfloat16)
        for path in [base, *base.iterdir()]:
            path.chmod(0o755)
        root = Path(place) / "c"
        saved = save(Checkpoints(root, keep=3), Weights(load_arena(base)), base, 1)
        root.chmod(0o555)
        try:
            said = unprivileged(lambda: save(Checkpoints(root, keep=3), Weights(load_arena(base)), base, 2))
            assert f"{root / 'generation-00000002'} could not be written" in said
            assert "Permission denied" in said
            assert "user " in said
            said = unprivileged(lambda: Checkpoints(root / "deeper", keep=3))
            assert f"{root / 'deeper'} as user " in said
            assert_complete(saved, base)
        finally:
            root.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "No such file"), ("", "cannot be read"), ("{", "cannot be read"), ("[]", "no generation"),
     ('{"generation": "7"}', "no generation"), ('{"generation": true}', "no generation"),
     ('{"generation": -1}', "no generation"), ('{"generation": 7}', "no step"),
     ('{"generation": 1, "step": 7, "epoch": 1, "ledger_position": 3}', "its checksum does not fit"),
     ("\xff", "cannot be read")],
)  # fmt: skip
def test_a_damaged_state_is_named(tmp_path, text, reason):
    (tmp_path / "hogwild").mkdir()
    path = tmp_path / "hogwild" / "state.json"
    if text is not None:
        path.write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_state(tmp_path)
    assert str(path) in str(caught.value)


def test_a_damaged_optimizer_is_named(tmp_path):
    (tmp_path / "hogwild").mkdir()
    path = tmp_path / "hogwild" / "optimizer.safetensors"
    with pytest.raises(CheckpointError, match=str(path)):
        read_optimizer(tmp_path)
    save_file({"a": torch.ones(9)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(path)):
        read_optimizer(tmp_path)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "hogwild/optimizer.safetensors", "config.json", "hogwild/state.json"]
)
@pytest.mark.parametrize("damage", ["a bit", "its end", "all of it"])
def test_damage_is_recognised_and_named(tmp_path, weights, base, file, damage):
    saved = save(Checkpoints(tmp_path / "c", keep=1), weights, base, 1)
    path = saved / file
    data = bytearray(path.read_bytes())
    if damage == "all of it":
        path.unlink()
    elif damage == "its end":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        generation.verify(saved)


# --- giving way ----------------------------------------------------------------------------------------------------


def test_a_paced_thread_rests_in_proportion_to_its_work_unless_there_is_a_hurry():
    hurry = threading.Event()
    with paced(0.2, hurry):
        began, cpu = time.perf_counter(), time.thread_time()
        while time.thread_time() - cpu < 0.02:
            pass
        rest()
        assert time.perf_counter() - began >= 5 * 0.02, "four times as long as it worked"
    with paced(1e-9, hurry):  # a rest would be endless, were it not bounded or in a hurry
        hurry.set()
        rest()
    rest()  # outside there is no pace
