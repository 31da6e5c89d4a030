"""What works on one arena: the verified views, the shared optimizer, and the trainer threads."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hogwild import checkpoint, generation, metrics, pulse, served, skeleton, streams
from hogwild import log as logs
from hogwild.apollo import Optimizer
from hogwild.arena.client import Arena
from hogwild.backward import TrainedLinear
from hogwild.curriculum import Curriculum
from hogwild.drift import Drift
from hogwild.encoder import Encoder
from hogwild.errors import CheckpointError, LedgerError, VerificationError
from hogwild.governor import Governor, stand_back
from hogwild.groups import Group
from hogwild.guard import Guard, largest_loss
from hogwild.history_report import layer
from hogwild.judge import Judge
from hogwild.ledger import Ledger
from hogwild.preparation import Directions, Preparation
from hogwild.settings import Config
from hogwild.trainer import Progress, Trainer
from hogwild.turn import Turn
from hogwild.weights import Weights
from hogwild_kernels.cpu import warm_up

log = logs.get(__name__)

RESTORED = "restored"
"""Key in the ledger: the arena into which a generation was written last, that generation, and the step counter then."""

_IDLE_S = 0.5  # how long a trainer waits for an example before it looks at its stop flag again


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    generation: int
    step: int
    path: Path


class Learner:
    """Trainer threads over one arena.

    Args:
        arena: verified against the checkpoint in `folder` by the caller.
        folder: the model's configuration, tokenizer and frozen tensors.

    Raises:
        ConfigError: more of the GPU's memory is allowed than it has.
        VerificationError: the served tensors do not make up the model.
    """

    def __init__(
        self, arena: Arena, folder: Path, config: Config, ledger: Ledger, curriculum: Curriculum
    ) -> None:
        self.arena, self.folder, self.config = arena, folder, config
        self.ledger, self.curriculum = ledger, curriculum
        self.weights = Weights(arena)
        device = arena.weights.device
        streams.cap(device, config.training.gpu_memory_gib)
        self.optimizer = Optimizer(config.optimizer, config.training.seed, device)
        self.progress = Progress(arena.control, config.training.epoch_updates, config.training.epoch_s)
        self.governor = Governor(config.governor, arena.control, partial(streams.settle, device))
        self.encoder = Encoder(folder, config.training, ledger, arena.chat)
        self.reader: PreTrainedModel = skeleton.build(folder, self.weights, apart=config.training.experts)
        self.trainable = skeleton.bound(self.reader)
        vocabulary = self.reader.config.get_text_config().vocab_size
        self.trainers: list[Trainer] = []
        for index in range(config.training.threads):
            trainer = Trainer(
                skeleton.build(folder, self.weights, apart=config.training.experts),
                self.optimizer,
                self.progress,
                set(self.trainable),
                config.training.context,
                seed=index,
                between_layers=self.governor.between_layers,
                unlearn_until_loss=config.training.unlearn_until_loss,
                batch_tokens=config.training.batch_tokens,
                activation_mib=config.training.activation_mib,
                max_loss=largest_loss(config.guard, vocabulary),
                embeddings=config.training.embeddings,
                verdict=self.trainers[0].verdict if self.trainers else None,
            )
            self.trainers.append(trainer)
        if not any(isinstance(module, TrainedLinear) for module in self.trainers[0].model.modules()):
            raise VerificationError(
                "no linear layer of the server is plain memory, so there is nothing to train",
                [f"{name}: {reason}" for name, reason in self.frozen.items()],
            )
        self.encoder.freezes = self.trainers[0].can_freeze
        if config.training.context == "frozen" and not self.encoder.freezes:
            log.warning("context.not_frozen", model_type=self.reader.config.model_type)
        if device.type == "cpu":
            warm_up(self.reader.dtype)  # compiles the update now, not in the middle of the first example
        self.drift = Drift(
            self.weights,
            self.reader,
            folder,
            config.replay.protected_every,
            seed=config.training.seed,
            stochastic=config.optimizer.rounding == "stochastic",
            moved=self.progress.moved,
            between=self.governor.between_layers,
        )
        self.failure: BaseException | None = None
        self._stopping = threading.Event()
        self._may_train = threading.Event()
        self._working: set[int] = set()  # threads that train or judge, by index
        self._asked_for_own_texts = False
        self._preparation = Preparation(
            self.reader, self.encoder, config, self._stopping.is_set, partial(stand_back, config.training),
            arena.weights.ensure_alive,
        )  # fmt: skip
        self.judge = Judge(
            config.probes, self.reader, ledger, self.progress, arena.control, self._preparation, self.pause,
            arena.weights.ensure_alive,
        )  # fmt: skip
        self.guard = Guard(config.guard, ledger, vocabulary, self.judge, curriculum.wake)
        self.turn = Turn(
            ledger, curriculum, self.encoder, self.guard, self.drift, arena.control, config.replay.self_weight
        )
        self._threads: list[threading.Thread] = []

    @property
    def frozen(self) -> dict[str, str]:
        """Tensors that are not trained: name -> why."""
        return {**self.arena.layout.frozen, **self.trainers[0].frozen}

    @property
    def training(self) -> bool:
        """Are the trainer threads allowed to take examples?"""
        return self._may_train.is_set()

    def restore(self, folder: Path, also: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Write a checkpoint's weights and optimizer state into the arena, in place; return its state.

        No trainer may be at work.

        Args:
            also: what must have happened before these weights are trusted; after a crash before that they are not.

        Raises:
            CheckpointError: it is damaged or does not fit; nothing has been written to the arena.
        """
        state = generation.read_state(folder)
        self.weights.check(folder)
        self.load_moments(folder)  # and this, before the arena is marked, not only before it is written
        self.claim(state["step"])  # before: a crash while the arena is written must find it ours
        self.progress.new_epoch()
        with self.arena.control.rewriting():
            self.weights.write(folder)
            streams.settle(self.arena.weights.device)
            self.progress.resume(state["step"], state["epoch"])
            self.arena.control.generation = state["generation"]
            restored = [self.arena.control.arena_id, state["generation"], self.progress.steps]
            self.ledger.set_meta(RESTORED, json.dumps(restored))
            also()
        self.judge.went_back(state)
        return state

    def claim(self, step: int = 0) -> None:
        """Note in the ledger that the arena is ours, and from which step on the ledger tells how it was trained.

        No trainer may be at work.

        Args:
            step: that the counter is about to be set to, if it is behind that.
        """
        self.ledger.set_metas(
            {
                "arena_id": self.arena.control.arena_id,
                "arena_steps": str(max(self.arena.control.steps, step)),
                "arena_pass": str(self.ledger.newest_pass()),
                "arena_steps_without_pass": "0",
                "arena_threads": str(self.config.training.threads),
            }
        )

    def load_moments(self, folder: Path) -> None:
        """Take the optimizer state of a checkpoint, as far as it means anything to these settings.

        Raises:
            CheckpointError: it is damaged, or was saved with another rank.
        """
        tensors = checkpoint.read_moments(folder, self.config)
        shapes = {name: tuple(region.shape) for name, region in self.trainable.items()}
        self.optimizer.load(tensors, shapes)

    def check_served(self, server: served.Server) -> served.Agreement:
        """*Served equals trained*, on fixed texts and on what was trained last.

        Raises:
            VerificationError: they differ.
            ServerError: the server cannot be asked.
        """
        fixed = self.encoder.plain(served.PROBE_TEXTS)
        recent = [ids for ids in self.turn.recent if 2 <= len(ids) <= served.MAX_PROBE_TOKENS]
        loaded = Path(self.arena.layout.checkpoint or self.arena.layout.source.path)
        return served.check(server, self.reader, [fixed, recent], self.config.server.probe_tolerance, loaded)

    def start(self) -> None:
        """Let the trainer threads take examples, starting them if need be."""
        self.arena.control.mark_trained()
        self.governor.hurry(False)
        self._may_train.set()
        if not self._threads:
            self.guard.after_crash()
            torch.set_num_threads(self.config.training.intra_op_threads)
            self._threads = [
                threading.Thread(target=self._run, args=(index,), name=f"trainer-{index}", daemon=True)
                for index in range(len(self.trainers))
            ]
            for thread in self._threads:
                thread.start()

    def write_own_texts(self, path: Path, base: str) -> None:
        """Load or make the texts that the model writes before it is trained, see `Preparation.own_texts`.

        Args:
            path: the file that keeps them.
            base: digest of the model as it came.
        """
        if self._asked_for_own_texts or not (self.config.replay.self_texts and self.config.replay.ratio):
            return
        self._asked_for_own_texts = True
        self._preparation.own_texts(path, base, self.curriculum.replay, trained=self.progress.steps > 0)
        if self.config.replay.protected_rank:
            self._preparation.protection(
                path.with_name("protected.safetensors"),
                base,
                self.curriculum.replay,
                list(self.trainable),
                lambda directions: self._protect(directions, base),
                embeddings=self.trainers[0].trains_embeddings,
            )

    def _protect(self, directions: Directions, base: str) -> None:
        device = self.arena.weights.device
        there = {id(basis): basis.to(device) for basis in directions.values()}  # layers share them
        directions = {name: there[id(basis)] for name, basis in directions.items()}
        for trainer in self.trainers:
            trainer.protect(directions)
        self.drift.protect(directions, base)

    def wait_for_own_texts(self, timeout_s: float | None = None) -> bool:
        """Until they are written, or given up. False: not within that time."""
        return self._preparation.done(timeout_s)

    @contextlib.contextmanager
    def _work(self, index: int) -> Iterator[bool]:
        """What `quiet` waits for; gives whether it may be done at all. Said first and asked then, so that it is either
        waited for or not done."""
        self._working.add(index)
        try:
            yield self._may_train.is_set()
        finally:
            self._working.discard(index)

    def pause(self) -> None:
        """Take no further example; what is under way is finished, however busy the server is."""
        self._may_train.clear()
        self.governor.hurry()

    def stop(self, timeout_s: float) -> bool:
        """Finish the examples under way and end the threads. False if one did not end in time."""
        self._stopping.set()
        self.governor.hurry()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            # In turns: of a signal that another thread was given, Python tells this one when it wakes.
            thread.join(0.1)
            while thread.is_alive() and time.monotonic() < deadline:
                thread.join(0.1)
        self._preparation.close()
        self.progress.settle()
        if not any(thread.is_alive() for thread in self._threads):
            return True
        if self.failure is None:  # the end is not the fault of what they are at
            self.guard.tried(self.curriculum.under_way())
        return False

    def quiet(self, timeout_s: float) -> bool:
        """After `pause`: wait until no example is being trained or judged. False if one still is in the end."""
        deadline = time.monotonic() + timeout_s
        while self.curriculum.in_flight or self._working:
            if self.failure is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def save(self, checkpoints: checkpoint.Checkpoints, about: Mapping[str, Any]) -> Saved:
        """Write a checkpoint under running trainers, and tell the ledger what is durable now.

        Raises:
            CheckpointError: it could not be written, or the probes have fallen; the one before stays current.
        """
        score = self.judge.judge()
        if self.judge.tripped is not None:
            raise CheckpointError("the probes have fallen: these weights are not kept")
        began = time.perf_counter()
        marker = self.ledger.begin_checkpoint()
        step, epoch = self.progress.steps, self.progress.epoch
        since = self.ledger.durable_marker()
        path = checkpoints.save(
            self.weights,
            self.folder,
            self.optimizer.tensors(),
            {
                "step": step,
                "epoch": epoch,
                "ledger_position": marker,
                "trained": self.ledger.trained_between(since, marker),
                "moved": self._moved(),
                **self.judge.probes.about(score),
                "arena": self.arena.control.arena_id,
                **about,
            },
        )
        number = generation.number(path) or 0
        durable = self.ledger.complete_checkpoint(
            marker, step=step, path=str(path), generation=number, parent=generation.read_state(path)["parent"]
        )
        self.arena.control.generation = number
        if score is not None:
            self.judge.probes.passed(number, score)
        metrics.checkpoint_seconds.observe(time.perf_counter() - began)
        log.info(
            "checkpoint.saved",
            path=str(path),
            generation=number,
            step=step,
            durable_examples=durable,
            mib=round(self.weights.nbytes / 2**20, 1),
            probes=None if score is None else {name: round(loss, 4) for name, loss in score.losses.items()},
            ms=round((time.perf_counter() - began) * 1000),
        )
        return Saved(number, step, path)

    def _moved(self) -> dict[str, float]:
        """layer -> sum of the norms of its updates since this was last asked."""
        moved: dict[str, float] = {}
        for trainer in self.trainers:
            for name, norm in trainer.take_moved().items():
                moved[layer(name)] = moved.get(layer(name), 0.0) + norm
        return {name: float(f"{norm:.4g}") for name, norm in moved.items()}

    def _run(self, index: int) -> None:
        with pulse.watched(f"trainer-{index}"):
            self._train(index)

    def _train(self, index: int) -> None:
        trainer = self.trainers[index]
        stand_back(self.config.training)
        try:
            while not self._stopping.is_set():
                pulse.beat(_IDLE_S)
                if not self._may_train.wait(_IDLE_S) or self._stopping.is_set():
                    continue
                if not self._preparation.done(_IDLE_S):
                    continue
                with self._work(index) as may:
                    if may:
                        self.judge.begin()
                batch = self.curriculum.take(timeout=_IDLE_S, step=self.progress.steps)
                if batch is None:
                    if not self.curriculum.in_flight:
                        self.progress.settle()
                    continue
                with self._work(index) as may:
                    if may:
                        self.turn.take(trainer, index, batch)
                        self.judge.look()
                    else:  # a pause began while it waited for the example
                        self.curriculum.give_back(batch)
        except LedgerError as error:  # the disk's fault, before or after a step
            self.failure = error
        except BaseException as error:
            # A trainer that dies may have left a layer half-written: the supervisor stops the service.
            self.failure = error
            log.exception("trainer.died", thread=index)

    def loss(self, group: Group) -> float:
        """The loss of an example with the weights as they are now, nats a trained token. Not while training runs."""
        return group.loss(self.trainers[0])
