"""The server and what it brought: its arena is taken over, and trained once it is seen to serve what is trained.

Offers and sessions come from the arena's hub, in a session's thread (`arena/hub.py`); the supervisor's loop asks for
the comparison with the server. `recovery.py` decides what becomes of an arena, `served.py` compares server and trainer.
"""

import threading
import time
from dataclasses import asdict
from typing import Any

from hogwild import log as logs
from hogwild import prompts, pulse, recovery, rope, served
from hogwild.arena import protocol
from hogwild.arena.client import Arena
from hogwild.chat_settings import MODELS_OWN
from hogwild.checkpoint_schedule import CheckpointSchedule
from hogwild.curriculum import Curriculum
from hogwild.errors import VerificationError
from hogwild.keeper import Keeper
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.settings import Config

log = logs.get(__name__)


_WAIT_S = 60.0
_QUIET_TIMEOUT_S = 60.0
_READERS_S = 1.0  # the server is asked before each look whether it answers


class Attachment:
    """One for the life of a daemon; servers come and go.

    Attributes:
        learner: on the newest arena; None until a server has brought one.
        server: what the newest server says of itself, of those that are there or else of all.
        connected: is one there now?
        must_check: served equals trained, as soon as the server answers.
        unasked: why the server could not be asked what it serves, in one line; empty: it could, or has not been.
        prompts_differ: from those that chats are trained behind, as far as the server has said.
        changing: held by whoever replaces the weights: an arena is taken, a generation is rolled back to.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        keeper: Keeper,
        curriculum: Curriculum,
        schedule: CheckpointSchedule,
    ) -> None:
        self._config, self._ledger, self._keeper = config, ledger, keeper
        self._curriculum, self._schedule = curriculum, schedule
        self.learner: Learner | None = None
        self.server: dict[str, Any] = {}
        self._servers: list[dict[str, Any]] = []  # a new one may come before the old one has gone
        self._coming_and_going = threading.Lock()
        self.must_check = False
        self.unasked = ""
        self.prompts_differ: prompts.Difference | None = None
        self._wait_s, self._wait_until = 0.0, 0.0
        self.changing = threading.Lock()
        self._closed = False
        self._api: served.Server | None = None
        self._asks: tuple[str, str, int | None] = "", "", None  # its URL, certificate and longest text

    @property
    def connected(self) -> bool:
        return bool(self._servers)

    def configure(self, config: Config) -> None:
        """Take over settings, for this arena and the next."""
        self._config = config
        if self.learner is not None:
            self.learner.governor.configure(config.governor)

    def close(self) -> Learner | None:
        """Begin to learn on no further arena. The learner that there is is the caller's to stop."""
        self._closed = True
        return self.learner

    def offered(self, arena: Arena) -> None:
        """Verify an arena that a server offers, and build the trainers on it. Runs in the session's thread.

        Raises:
            HogwildError: it is refused; nothing has been written to it.
        """
        with self.changing:
            self._keeper.restore_current()  # mended, where it is damaged
            taken = recovery.take(
                arena, self._config, self._ledger, self._keeper.checkpoints, self._curriculum
            )
            learner = taken.learner
            self._schedule.starts_from(taken.saved_step)
            self.learner = learner
            learner.governor.configure(self._config.governor)  # read anew while the arena was verified
            if self._closed:  # nobody else stops what it prepares, for which the process would wait
                learner.stop(0)
        log.info(
            "arena.attached",
            arena=arena.control.arena_id,
            model=str(learner.folder),
            tensors=len(arena.layout.tensors),
            frozen=learner.frozen,
            mib=round(arena.weights.nbytes / 2**20, 1),
            inode=arena.weights.inode()[1],
            step=learner.progress.steps,
            restored=taken.restored,
            repeated=taken.repeated,
            moments=len(learner.optimizer),
        )

    def on_session(self, server: dict[str, Any], begins: bool) -> None:
        """A server has come, or gone. Runs in the session's thread."""
        with self._coming_and_going:
            if begins:
                self._servers.append(server)
            else:
                self._servers.remove(server)
            if self._servers and self._servers[-1] is not self.server:
                self.server = self._servers[-1]
                self.must_check = True
                self._asked("")
        if begins:
            log.info("server.attached", **protocol.shown(server))
        else:
            log.warning("server.lost", **protocol.shown(server))

    def check(self, after: str) -> None:
        """*Served equals trained*; training starts when it holds, and stops when it does not.

        A server that could not be asked is left alone for a while, twice as long each time, up to _WAIT_S.
        """
        if time.monotonic() < self._wait_until:
            return
        with pulse.away():  # a server has its own time to answer
            self._compare_with_server(after)

    def _asked(self, error: str) -> None:
        """Note what came of asking the server; empty: nothing is wrong."""
        self.unasked = error
        self._wait_s = min(max(2 * self._wait_s, 1.0), _WAIT_S) if error else 0.0
        self._wait_until = time.monotonic() + self._wait_s

    def _take_frequencies(self, learner: Learner) -> bool:
        """Rotary frequencies are those of the server that is there: a new one may take longer texts than the last, in
        the same memory. False: somebody still reads the model as it is, and they have to wait."""
        longest = self.server.get("max_model_len")
        models = [learner.reader, *(trainer.model for trainer in learner.trainers)]
        if not any(rope.differs(model, longest) for model in models):
            return True
        # A checkpoint under way is judged; what has fallen is gone back from, by what it was.
        if self._keeper.saving or not learner.wait_for_own_texts(0) or learner.judge.tripped is not None:
            self._wait_until = time.monotonic() + _READERS_S
            return False
        with self.changing:
            learner.pause()  # it begins again once the server is seen to serve what these compute
            if not learner.quiet(_QUIET_TIMEOUT_S) or learner.judge.tripped is not None:
                return False
            for model in models:
                rope.fix(model, longest)
            learner.judge.start_over()
        log.info("rope.changed", max_model_len=longest)
        return True

    def _compare_with_server(self, after: str) -> None:
        learner = self.learner
        assert learner is not None
        asked = self.must_check
        self.must_check = False  # first: a server that comes meanwhile has to be asked, too
        named, announced = self._config.server.url, self.server.get("url", "")
        url, certificate = named or announced, self.server.get("certificate", "")
        try:
            longest = self.server.get("max_model_len")
            if self._api is None or self._asks != (url, certificate, longest):
                self._asks = url, certificate, longest
                self._api = served.Server(
                    url,
                    self._config.server.api_key_env,
                    certificate,
                    named=bool(named),
                    max_model_len=longest,
                )
            answers = self._api.ready()
            if asked:
                self.unasked = "" if answers else f"GET {url.rstrip('/')}/health is not answered"
            if not answers or not self._take_frequencies(learner):
                # Still starting, or gone: asked again in the next turn, or when it comes back.
                if asked:
                    self.must_check = True
                return
            agreement = learner.check_served(self._api)
        except served.ServerError as error:
            log.warning("server.unchecked", after=after, error=str(error))
            self._asked(str(error))
            self._api = None  # its certificate may have been renewed
            if after == "attach" or not learner.training:
                self.must_check = True  # nothing is trained before a check has passed
            return
        except VerificationError as error:
            learner.pause()
            log.error("guard.tripped", guard="served_equals_trained", after=after, problems=error.problems)
            return
        self._asked("")
        log.info(
            "server.verified",
            after=after,
            mean_difference=round(agreement.mean, 4),
            largest_difference=round(agreement.largest, 4),
            tolerance=round(agreement.tolerance, 4),
            tokens=agreement.tokens,
        )
        if learner.encoder.follow(self.server.get("chat", MODELS_OWN)):
            log.info("prompts.changed")
        self._compare_prompts(learner, self._api)
        if not learner.training and learner.judge.tripped is None:
            learner.start()
            log.info(
                "training.started", threads=self._config.training.threads, **asdict(self._ledger.counts())
            )

    def _compare_prompts(self, learner: Learner, server: served.Server) -> None:
        """Say, once, if chats are trained behind other prompts than are served."""
        before, now = self.prompts_differ, prompts.difference(server, learner.encoder)
        self.prompts_differ = now
        if now is not None and now != before:
            log.warning("prompts.differ", **asdict(now))
