"""What a learner needs before it trains: the model's own texts for replay, and its probes. Made in a thread of its own,
for which training waits and nobody else does.
"""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hogwild import heap, protection, selfreplay, skeleton
from hogwild import log as logs
from hogwild import probes as probing
from hogwild.encoder import Encoder
from hogwild.errors import HogwildError
from hogwild.probes import Probe
from hogwild.replay import Replay
from hogwild.settings import Config

log = logs.get(__name__)

Directions = Mapping[str, torch.Tensor]
"""Name of a linear layer -> (k, n) directions of its input; of the input embedding -> (k,) tokens."""


class Preparation:
    """Work that is done once, in order, before training.

    Args:
        model: for reading only.
        encoder: has the tokenizer, and the lock that is held while it is used.
        stopped: asked between tokens.
        stand_back: called first in the thread: the server goes first.
        ensure_alive: asked before what was read of the weights is kept, see `Held.ensure_alive`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        config: Config,
        stopped: Callable[[], bool],
        stand_back: Callable[[], None],
        ensure_alive: Callable[[], None],
    ) -> None:
        self._model, self._encoder, self._config = model, encoder, config
        self._stopped, self._stand_back, self._ensure_alive = stopped, stand_back, ensure_alive
        self._thread: ThreadPoolExecutor | None = None
        self._work: list[Future[None]] = []

    def begin(self, work: Callable[[], None]) -> None:
        """Do this after what is to be done already. Its failure is logged: learning without it is worse, not wrong."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                log.exception("preparation.failed", error=str(error))
            heap.trim()  # the inputs of all layers were held

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "preparation", self._stand_back)
        self._work.append(self._thread.submit(run))

    def done(self, timeout_s: float | None = None) -> bool:
        """Wait until all of it is done, or given up."""
        return not self._work or not wait(self._work, timeout_s).not_done

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def own_texts(self, path: Path, base: str, replay: Replay, *, trained: bool) -> None:
        """Load the texts that the model wrote before it was trained or, while it is untrained, have it write them (at
        most about `replay.self_limit_s`).

        Args:
            path: the file that keeps them.
            base: digest of the model as it came.
            replay: gets them.
            trained: it has been trained already.
        """
        try:
            replay.own = selfreplay.load(path, base) or ()
        except HogwildError as error:
            log.warning("selfreplay.unreadable", path=str(path), error=str(error))
        if replay.own:
            log.info("selfreplay.loaded", path=str(path), texts=len(replay.own))
        elif trained:
            log.warning("selfreplay.missing", path=str(path), reason="the model has been trained already")
        else:
            self.begin(lambda: self._write_own_texts(path, base, replay))

    def _write_own_texts(self, path: Path, base: str, replay: Replay) -> None:
        began, settings = time.perf_counter(), self._config.replay
        try:
            with self._encoder.lock:
                prompts = selfreplay.prompts(self._encoder.tokenizer, settings.self_texts)
            samples = selfreplay.make(
                self._model,
                prompts,
                selfreplay.ends(self._model, self._encoder.tokenizer),
                tokens=settings.self_tokens,
                seed=self._config.training.seed,
                limit_s=settings.self_limit_s,
                stopped=self._stopped,
            )
            if self._stopped():
                return
            self._ensure_alive()
            selfreplay.save(path, base, self._config.training.seed, samples)
            # As read from the file, whose numbers are rounded: a restart must go on with the very same.
            replay.own = selfreplay.load(path, base) or ()
            log.info(
                "selfreplay.made",
                path=str(path),
                texts=len(samples),
                wanted=settings.self_texts,
                tokens=sum(len(one.ids) - one.start for one in samples),
                seconds=round(time.perf_counter() - began, 1),
            )
        except Exception as error:
            log.exception("selfreplay.failed", path=str(path), error=str(error))

    def protection(
        self,
        path: Path,
        base: str,
        replay: Replay,
        trainable: Collection[str],
        use: Callable[[Directions], None],
        *,
        embeddings: bool = False,
    ) -> None:
        """Find the directions that updates leave alone, or load them, after the own texts are there, and `use` them.

        Args:
            path: the file that keeps them.
            base: digest of the model as it came.
            replay: has the texts.
            trainable: names of the weights that are trained.
            embeddings: the input embedding is trained too, and a head that is tied to it.
        """

        def run() -> None:
            began, settings = time.perf_counter(), self._config
            rank = settings.replay.protected_rank
            try:
                found = protection.load(path, base, rank)
            except HogwildError as error:
                log.warning("protection.unreadable", path=str(path), error=str(error))
                found = None
            lately = [skeleton.table_name(self._model)] if embeddings else []
            apart = protection.experts(self._model)
            if found is not None and not (
                found.keys() >= set(lately) and (not apart or found.keys() & set(apart))
            ):
                found = None  # they were frozen when it was written
            if found is None:
                if not replay.own:
                    return
                made = protection.measure(
                    self._model,
                    trainable,
                    [one.ids for one in replay.own],
                    rank=rank,
                    budget_bytes=settings.training.activation_mib << 20,
                    seed=settings.training.seed,
                    stopped=self._stopped,
                    embeddings=embeddings,
                )
                if self._stopped():
                    return
                self._ensure_alive()
                protection.write(path, base, rank, made)
                found = protection.load(path, base, rank) or {}  # shared and rounded as after a restart
            use(found)
            log.info(
                "protection.ready",
                path=str(path),
                layers=len(found),
                mib=round(sum(one.nbytes for one in {id(t): t for t in found.values()}.values()) / 2**20, 1),
                seconds=round(time.perf_counter() - began, 1),
            )

        self.begin(run)

    def own_probes(self, path: Path, base: str, *, step: int) -> list[Probe]:
        """The probes that the model wrote before it was trained; written now where there are none.

        Args:
            step: training steps done: what a trained model writes says less.
        """
        try:
            found = probing.load(path, base)
        except HogwildError as error:
            log.warning("probes.unreadable", path=str(path), error=str(error))
            found = None
        if found is not None:
            return found
        began = time.perf_counter()
        with self._encoder.lock:
            made = probing.make(self._model, self._encoder.tokenizer, self._config.probes, self._stopped)
        if self._stopped():
            return []
        self._ensure_alive()
        probing.save(path, base, made)
        log.info(
            "probes.made", path=str(path), probes=len(made), step=step, seconds=round(time.perf_counter() - began, 1)
        )  # fmt: skip
        return made
