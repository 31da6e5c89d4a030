"""History on a real disk: every generation comes back bit for bit, and damage is found, named and walked around."""

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hogwild import generation
from hogwild.checkpoint import Checkpoints
from hogwild.config import HistoryConfig
from hogwild.history import History
from hogwild.weights import Weights, load_arena
from support import digest
from tiny import llama, tokenizer


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
