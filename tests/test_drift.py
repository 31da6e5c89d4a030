"""What rounding adds in the protected directions is taken back, and nothing else is touched."""

import os
from pathlib import Path

import pytest
import torch

from families import build
from hogwild import drift, protection, skeleton
from hogwild.apollo import Optimizer
from hogwild.drift import Drift
from hogwild.encoding import Encoded
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, digest, load_arena


class Trained:
    """A bf16 model that is trained with protection, and what has moved in it."""

    def __init__(self, folder: Path, every: int, family: str = "llama") -> None:
        self.folder = build(family, folder, torch.bfloat16)
        self.weights = Weights(load_arena(self.folder))
        generator = torch.Generator().manual_seed(1)
        texts = [torch.randint(3, 40, (9,), generator=generator).tolist() for _ in range(12)]
        self.reader = skeleton.build(self.folder, self.weights)
        places = skeleton.bound(self.reader)
        self.trainable = set(places)
        self.live = {name: self.weights.at(region) for name, region in places.items()}
        self.directions = protection.measure(
            self.reader, self.trainable, texts,
            rank=8, budget_bytes=1 << 20, seed=0,
        )  # fmt: skip
        self.trainer = Trainer(
            skeleton.build(self.folder, self.weights), Optimizer(OptimizerConfig(lr=1e-4, rank=4), 0),
            Progress(self.weights.arena.control, 4), self.trainable, "frozen", seed=0,
        )  # fmt: skip
        self.drift = Drift(self.weights, self.reader, self.folder, every)
        self.trainer.protect(self.directions)
        self.drift.protect(self.directions, digest(self.folder))
        self.before = self.bits()

    def bits(self) -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in self.live.items()}

    def train(self, steps: int) -> "Trained":
        for step in range(1, steps + 1):
            self.trainer.step([Item(Encoded([5, 63, 7 + step % 9, 63, 9], [False, True, True, True, True]))])
            self.drift.after(step)
        return self

    def inside(self) -> float:
        """Of all that has moved, the share that lies in protected directions, by squares."""
        inside = whole = 0.0
        for name, basis in self.directions.items():
            moved = self.live[f"{name}.weight"].float() - self.before[f"{name}.weight"].float()
            inside += float((moved @ basis.float().T).square().sum())
            whole += float(moved.square().sum())
        return inside / whole


FAMILIES = ["llama", "gpt2", "zamba2"]
"""Two of them keep weights transposed, or use one in several layers."""


@pytest.mark.parametrize("family", FAMILIES)
def test_what_rounding_adds_in_protected_directions_is_taken_back(tmp_path, family):
    left = Trained(tmp_path / "left", 0, family).train(60).inside()
    taken_back = Trained(tmp_path / "back", 5, family).train(60).inside()
    assert left > 0.03, "the rounding of 60 steps has to be seen"
    assert taken_back < left / 3


def test_every_layer_has_its_turn_once_in_so_many_steps_in_pieces_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "_BLOCK_BYTES", 5 * 32 * 4)
    trained = Trained(tmp_path, 0).train(30)
    before, inside = trained.bits(), trained.inside()
    every = Drift(trained.weights, trained.reader, trained.folder, 7)
    every.protect(trained.directions, digest(trained.folder))
    turns: list[str] = []
    for step in range(31, 38):
        was = trained.bits()
        every.after(step)
        turns += [name for name, bits in trained.bits().items() if not torch.equal(bits, was[name])]
    assert sorted(turns) == sorted(f"{name}.weight" for name in trained.directions)
    assert trained.inside() < inside / 3
    for name, basis in trained.directions.items():  # outside, no more than one more rounding
        change = trained.weights.view(f"{name}.weight").float() - before[f"{name}.weight"].float()
        outside = change - change @ basis.float().T @ basis.float()
        gap = before[f"{name}.weight"].float().abs().max() * 2**-7
        assert outside.abs().max() < 2 * gap


def test_answers_from_before_it_are_not_reused_once_training_rests(tmp_path):
    trained = Trained(tmp_path, 0).train(2)
    progress = trained.trainer.progress
    progress.settle()  # as an epoch that began right after the step's last update
    epoch = progress.epoch
    every = Drift(trained.weights, trained.reader, trained.folder, 1, moved=progress.moved)
    every.protect(trained.directions, digest(trained.folder))
    every.after(2)
    progress.settle()
    assert progress.epoch == epoch + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_not_moved_stays_to_the_bit(tmp_path, family):
    trained = Trained(tmp_path, 1, family)
    for step in range(3):
        trained.drift.after(step)
    assert all(torch.equal(bits, trained.before[name]) for name, bits in trained.bits().items())


@pytest.mark.parametrize("how", ["rewritten", "rewritten, with the old time", "gone", "rewritten before"])
def test_another_model_in_its_place_is_not_drifted_to(tmp_path, capsys, how):
    trained = Trained(tmp_path, 0).train(10)
    file = trained.folder / "model.safetensors"
    base, status = digest(trained.folder), file.stat()

    def rewrite() -> None:
        with file.open("r+b") as opened:
            opened.seek(-100, os.SEEK_END)
            opened.write(bytes(100))

    if how == "rewritten before":  # the last daemon's model, and not this one's
        rewrite()
    every = Drift(trained.weights, trained.reader, trained.folder, 1)
    every.protect(trained.directions, base)
    if how == "gone":
        file.unlink()
    elif how != "rewritten before":
        rewrite()
    if how == "rewritten, with the old time":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = trained.bits()
    for step in range(3):
        every.after(step)
    assert all(torch.equal(bits, before[name]) for name, bits in trained.bits().items())
    said = [line for line in capsys.readouterr().out.splitlines() if "protection.adrift" in line]
    assert len(said) == 1
    assert str(trained.folder) in said[0]
