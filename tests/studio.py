"""Everything of the daemon but its sockets, on a tiny model: ledger, curriculum, trainers, checkpoints, history.

All of it is the real thing. What is left out is the server that would have to be asked whether it serves the same
weights before training starts (tests/test_service.py has one).
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hogwild import config as configuration
from hogwild import recovery, rollback
from hogwild.arena.client import Arena
from hogwild.attachment import Attachment
from hogwild.checkpoint_schedule import CheckpointSchedule
from hogwild.curriculum import Curriculum
from hogwild.examples import parse_line
from hogwild.keeper import Keeper
from hogwild.ledger import GoodLine, Ledger
from hogwild.weights import load_arena
from tiny import WORDS, llama, tokenizer

DEADLINE_S = 300.0


def model(folder: Path) -> Path:
    tokenizer(llama(folder, torch.bfloat16))
    return folder


class Studio:
    """One start of the daemon on a state folder.

    Args:
        arena: that outlived the last one; None: a server has loaded the model anew.
        settings: dotted configuration keys.
    """

    def __init__(self, root: Path, arena: Arena | None = None, **settings: Any) -> None:
        self.model = root / "model"
        defaults = {"training.threads": 1, "training.passes": 2, "optimizer.rank": 8, "optimizer.lr": 1e-3,
                    "optimizer.gap": 7, "history.base_every": 3}  # fmt: skip
        named = {key.replace("__", "."): value for key, value in settings.items()}
        self.config = configuration.load(None, {"state_dir": str(root / "state"), **defaults, **named})
        self.ledger = Ledger(self.config.state_dir / "ledger.sqlite")
        self.keeper = Keeper(self.config)
        rollback.finish_on_disk(self.ledger, self.keeper)
        self.curriculum = Curriculum(self.ledger, self.config.replay, seed=self.config.training.seed)
        self.arena = arena or load_arena(self.model)
        self.keeper.restore_current()
        taken = recovery.take(self.arena, self.config, self.ledger, self.keeper.checkpoints, self.curriculum)
        self.learner, self.restored = taken.learner, taken.restored

    def drop(self, name: str, count: int, seed: int = 0) -> None:
        """Accept a file of `count` examples."""
        chance = random.Random(f"{name} {seed}")
        lines = []
        for number in range(count):
            prompt, completion = (" ".join(chance.choices(WORDS, k=6)) for _ in range(2))
            lines.append(
                f'{{"prompt": "{prompt}", "completion": " {completion}", "id": "{name}-{number}"}}'.encode()
            )
        self.accept(name, lines, seed)

    def accept(self, name: str, lines: Sequence[bytes], seed: int = 0) -> None:
        """Accept a file of these lines."""
        good = [GoodLine(number, 0, raw, parse_line(raw)) for number, raw in enumerate(lines, 1)]
        self.ledger.accept_file(name, f"{name} {seed}", good, passes=self.config.training.passes)
        self.curriculum.wake()

    def train(self, passes: int | None = None) -> None:
        """Until nothing is left, or at least so many passes more are recorded; then at rest."""
        target = None if passes is None else self.ledger.newest_pass() + passes
        self.learner.start()
        deadline = time.monotonic() + DEADLINE_S
        while not (self.ledger.is_idle() if target is None else self.ledger.newest_pass() >= target):
            assert self.learner.failure is None, self.learner.failure
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self.learner.pause()
        assert self.learner.quiet(DEADLINE_S)

    def save(self) -> int:
        """A checkpoint, in history too; its generation."""
        about = {
            "base_path": str(self.model),
            "base_digest": self.ledger.get_meta("base_digest"),
            "config": self.config.model_dump(mode="json"),
        }
        self.keeper.start_saving(self.learner, about)
        saved = self.keeper.saved(wait=True)
        assert saved is not None
        assert not isinstance(saved, Exception), saved
        self.keeper.start_tidying()
        self.keeper.background(lambda: None).result()  # in history, too
        return saved.generation

    def roll_back(self, generation: int, *, retrain: bool = False) -> dict[str, Any]:
        return rollback.roll_back(
            generation, retrain=retrain, ledger=self.ledger, keeper=self.keeper, learner=self.learner
        )

    def attachment(self) -> Attachment:
        """What the daemon keeps in mind of its servers, with this learner."""
        schedule = CheckpointSchedule(self.config, self.ledger, self.keeper)
        attachment = Attachment(self.config, self.ledger, self.keeper, self.curriculum, schedule)
        attachment.learner = self.learner
        return attachment

    def bits(self) -> dict[str, bytes]:
        """Every weight and every moment, as they are now."""
        weights = self.learner.weights
        live = {name: weights.view(name).contiguous() for name in weights.names}
        return {
            name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            for name, tensor in (live | self.learner.optimizer.tensors()).items()
        }

    def states(self) -> dict[str, int]:
        """Examples by state."""
        counts = self.ledger.counts()
        return {name: getattr(counts, name) for name in ("pending", "trained", "durable", "failed", "undone")}

    def close(self) -> Arena:
        """A graceful stop, without saving; the arena, which lives on if somebody keeps it."""
        assert self.learner.stop(DEADLINE_S)
        self.keeper.close()
        self.ledger.close()
        return self.arena


def assert_comes_back(root: Path, first: int, saved: dict[str, bytes], moves: str, **settings: Any) -> None:
    """After a restart everything is as it was `saved`, as generation `first`; and after more training, which moves the
    weight called `moves`, a rollback brings it back once more. To the bit."""
    studio = Studio(root, **settings)
    assert studio.bits() == saved, "a new arena, and everything back in it"
    studio.drop("b", 3)
    studio.train()
    studio.save()
    assert studio.bits()[moves] != saved[moves]
    studio.roll_back(first)
    assert studio.bits() == saved
    studio.close()
