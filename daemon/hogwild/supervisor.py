"""The daemon: knows every stage and turns the loop. Stages know nothing of it.

Signal handlers only set flags; `turn` is one round of the loop and can be called without threads or signals.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hogwild import (
    __version__,
    generation,
    leftovers,
    metrics,
    pulse,
    recovery,
    rollback,
    served,
    state_lock,
    status_line,
    trips,
)
from hogwild import config as configuration
from hogwild import log as logs
from hogwild.arena.client import Arena
from hogwild.arena.hub import Hub
from hogwild.commands import Command, Commands
from hogwild.curriculum import Curriculum
from hogwild.errors import CheckpointError, ConfigError, HogwildError, VerificationError
from hogwild.keeper import Keeper
from hogwild.learner import Learner, Saved
from hogwild.ledger import Ledger
from hogwild.notify import Notifier
from hogwild.settings import Config
from hogwild.spool import Spool
from hogwild.status import Status
from hogwild.watchdog import Watchdog

log = logs.get(__name__)

_TURN_S = 0.1
_VERSIONS = ("torch", "transformers", "safetensors")
_BEAT_S = 1.0
_STATUS_S = 5.0  # counting a million examples takes 0.4 s
_STATUS_RETRY_S = 60.0
_STOP_TIMEOUT_S = 120.0


class Supervisor:
    """One daemon, on one state folder.

    Args:
        config: effective configuration.
        config_path: re-read on SIGHUP; None if there is no file.
        overrides: what the command line said, which still counts then.

    Raises:
        HogwildError: the state folder is in use or unusable.
    """

    def __init__(
        self,
        config: Config,
        config_path: Path | None = None,
        overrides: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config, self._config_path, self._overrides = config, config_path, overrides
        self._lock_file = state_lock.take(config.state_dir)
        leftovers.sweep(config.state_dir, config.spool.dir)
        self.ledger = Ledger(config.state_dir / "ledger.sqlite")
        self.keeper = Keeper(config)
        rollback.finish_on_disk(self.ledger, self.keeper)
        self.curriculum = Curriculum(
            self.ledger, config.replay, seed=config.training.seed, step_tokens=config.training.step_tokens
        )
        self.spool = Spool(
            config.spool,
            self.ledger,
            passes=config.training.passes,
            on_accepted=lambda _file: self.curriculum.wake(),
        )
        self.commands = Commands()
        self.hub = Hub(config.socket, self._offered, self._on_session, self.commands.ask)
        self.learner: Learner | None = None
        self._server: dict[str, Any] = {}
        self._server_here = False
        self._must_check = False  # served equals trained, as soon as the server answers
        self._saved_step, self._tried_step, self._tried_at = 0, 0, time.monotonic()
        self._asked: list[Command] = []  # for a checkpoint that is not begun yet
        self._saving: list[Command] = []  # for the one that is being written
        self._changing = threading.Lock()  # one at a time: an arena is taken, a generation is rolled back to
        self._api: served.Server | None = None
        self._stop = self._reload = self._save_now = False
        self._stuck = False  # the probes have fallen, and no generation could be gone back to
        self._failure = ""
        self._wrote_status_at = 0.0
        self._status: dict[str, Any] = {}
        self._collector = Status(config, self.ledger)
        self._refused = ""  # why the newest offer of a server was
        self._systemd = Notifier()
        self._watchdog = Watchdog(self._systemd, self._ready, self._status_line)

    def run(self) -> int:
        """Serve until TERM or INT. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._flag("_stop"))
        signal.signal(signal.SIGHUP, self._flag("_reload"))
        signal.signal(signal.SIGUSR1, self._flag("_save_now"))
        log.info(
            "daemon.started",
            version=__version__,
            pid=os.getpid(),
            spool=str(self.config.spool.dir / "incoming"),
            socket=str(self.config.socket),
            state=str(self.config.state_dir),
            queued=self.ledger.counts().pending,
        )
        self.hub.start()
        self.keeper.start_tidying()  # what the last daemon had no time for
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        spooling = threading.Event()
        spool_thread = threading.Thread(target=self._watch_spool, args=(spooling,), name="spool", daemon=True)
        spool_thread.start()
        self._watchdog.start()
        with metrics.serving(self.config.metrics.port), pulse.watched("loop"):
            code = self._turn_until_stopped(spool_thread)
            spooling.set()
            self._watchdog.stopping()
            with pulse.away():
                code = max(code, self._shut_down(save=code == 0))
        self._watchdog.end("stopped" if code == 0 else f"failed: {self._failure or 'see the log'}")
        return code

    def _turn_until_stopped(self, spool_thread: threading.Thread) -> int:
        try:
            while not self._stop:
                pulse.beat()
                self.turn()
                if not spool_thread.is_alive():
                    raise HogwildError("the spool thread ended; see the log line before this one")
                time.sleep(_TURN_S)
        except HogwildError as error:
            log.error("daemon.failed", error=str(error))
            self._failure = str(error)
            return 1
        return 0

    def _watch_spool(self, stop: threading.Event) -> None:
        with pulse.watched("spool"):
            self.spool.run(stop)

    def turn(self) -> None:
        """One round: what signals and commands asked for, verification that is due, checkpoints that are due.

        Raises:
            HogwildError: the service cannot go on.
        """
        if self._reload:
            self._reload = False
            self._reread()
        while (command := self.commands.next()) is not None:
            with pulse.away():
                self._obey(command)
        learner = self.learner
        if learner is None:
            return
        if learner.failure is not None:
            raise HogwildError(f"a trainer thread died ({learner.failure!r}): its layer may be half-written")
        if learner.judge.tripped is not None and not self._stuck:
            with pulse.away():
                self._probes_fell(learner, go_on=True)
        if self._must_check:
            self._check(after="attach")
        if (saved := self.keeper.saved()) is not None and self._after_save(saved) and not self._stop:
            self._check(after="checkpoint")
        if not self.keeper.saving and self._checkpoint_due(learner):
            self._begin_save(learner)
        self._write_status(learner)

    # --- the server's side ---------------------------------------------------------------------------------------

    def _offered(self, arena: Arena) -> None:
        try:
            self._on_offer(arena)
        except Exception as error:
            self._refused = str(error).splitlines()[0] if str(error) else repr(error)
            raise
        self._refused = ""

    def _on_offer(self, arena: Arena) -> None:
        """Verify an arena that a server offers, and build the trainers on it. Runs in the session's thread.

        Raises:
            HogwildError: it is refused; nothing has been written to it.
        """
        with self._changing:
            current = self.keeper.restore_current()  # mended, where it is damaged
            taken = recovery.take(arena, self.config, self.ledger, self.keeper.checkpoints, self.curriculum)
            learner = taken.learner
            # What was written into the arena just now is on disk; what outlived the last daemon may not be.
            saved = generation.read_state(current)["step"] if current is not None else 0
            self._saved_step = saved if taken.restored is None else learner.progress.steps
            self._tried_step, self._tried_at = self._saved_step, time.monotonic()
            self.learner = learner
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

    def _on_session(self, server: dict[str, Any], begins: bool) -> None:
        self._server_here = begins
        if begins:
            self._server = server
            self._must_check = True
            log.info("server.attached", **server)
        else:
            log.warning("server.lost", **server)

    def _check(self, after: str) -> None:
        """*Served equals trained*; training starts when it holds, and stops when it does not."""
        with pulse.away():  # a server has its own time to answer
            self._compare_with_server(after)

    def _compare_with_server(self, after: str) -> None:
        learner = self.learner
        assert learner is not None
        url = self.config.server.url or self._server.get("url", "")
        if self._api is None or self._api.url != url:
            self._api = served.Server(url, self.config.server.api_key_env)
        server = self._api
        if not server.ready():
            return  # still starting, or gone: asked again in the next turn, or when it comes back
        self._must_check = False
        try:
            agreement = learner.check_served(server)
        except served.ServerError as error:
            log.warning("server.unchecked", after=after, error=str(error))
            self._must_check = (
                after == "attach" or not learner.training
            )  # nothing is trained before a check has passed
            return
        except VerificationError as error:
            learner.pause()
            log.error("guard.tripped", guard="served_equals_trained", after=after, problems=error.problems)
            return
        log.info(
            "server.verified",
            after=after,
            mean_difference=round(agreement.mean, 4),
            largest_difference=round(agreement.largest, 4),
            tolerance=round(agreement.tolerance, 4),
            tokens=agreement.tokens,
        )
        if not learner.training and learner.judge.tripped is None:
            learner.start()
            log.info("training.started", threads=self.config.training.threads, **asdict(self.ledger.counts()))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _probes_fell(self, learner: Learner, *, go_on: bool) -> None:
        """Back to the last good generation.

        Raises:
            HogwildError: it failed half-way, and the service cannot go on.
        """
        if (saved := self.keeper.saved(wait=True)) is not None:  # one that is not kept, because of this
            self._after_save(saved)
        try:
            with self._changing:
                trips.go_back(self.ledger, self.keeper, learner, go_on=go_on)
        except HogwildError as error:
            self._stuck = True
            log.error("guard.stuck", error=str(error))
            if rollback.pending(self.ledger) is not None:
                raise
            return
        self._saved_step = self._tried_step = learner.progress.steps
        self.keeper.start_tidying()

    def _obey(self, command: Command) -> None:
        """Do what a person asked for, or see that it is done.

        Raises:
            HogwildError: it failed half-way, and the service cannot go on.
        """
        if command.name == "checkpoint":
            if self.learner is None:
                command.refuse("no server has brought its weights yet: there is nothing to save")
            else:
                self._asked.append(command)
        elif command.name == "rollback":
            self._roll_back(command)
        elif command.name == "retrain":
            self._retrain(command)
        else:
            command.refuse(f"this daemon ({__version__}) knows no command {command.name!r}")

    def _roll_back(self, command: Command) -> None:
        number, retrain = command.arguments.get("generation"), command.arguments.get("retrain")
        if type(number) is not int or number < 0 or type(retrain) is not bool:
            command.refuse(f"not a generation: {command.arguments!r:.100}")
            return
        waited = command.age_s
        try:
            with self._changing:
                done = rollback.roll_back(
                    number, retrain=retrain, ledger=self.ledger, keeper=self.keeper, learner=self.learner
                )
        except HogwildError as error:
            log.error("rollback.failed", generation=number, error=str(error))
            command.refuse(str(error))
            if rollback.pending(self.ledger) is not None:
                raise  # the weights may be half-written: the next start finishes it
            return
        if (saved := self.keeper.saved(wait=True)) is not None:  # it was under way when the command came
            self._after_save(saved)
        if self.learner is not None:
            self._saved_step = self._tried_step = self.learner.progress.steps
            self._stuck, self.learner.judge.tripped = False, None
        metrics.rollbacks.labels(by="person").inc()
        self.keeper.start_tidying()
        command.done(**done, waited_ms=round(waited * 1000))

    def _retrain(self, command: Command) -> None:
        """Let examples out of quarantine."""
        ids, file = command.arguments.get("examples"), command.arguments.get("file")
        if not (ids is None or (isinstance(ids, list) and all(type(one) is int for one in ids))) or not (
            file is None or isinstance(file, str)
        ):
            command.refuse(f"not examples: {command.arguments!r:.100}")
            return
        count = self.ledger.guards.release(ids, file=file)
        self.curriculum.wake()
        log.info("quarantine.released", examples=count, file=file)
        command.done(examples=count)

    def _checkpoint_due(self, learner: Learner) -> bool:
        settings, steps = self.config.checkpoint, learner.progress.steps
        if self._save_now or self._asked:
            return True
        by_time = settings.interval_s and time.monotonic() - self._tried_at >= settings.interval_s
        by_updates = settings.interval_updates and steps - self._tried_step >= settings.interval_updates
        return bool(by_time or by_updates) and self._unsaved(learner)

    def _unsaved(self, learner: Learner) -> bool:
        """Is there anything in the weights that no checkpoint is sure to hold?"""
        return learner.progress.steps != self._saved_step or self.ledger.has_passes_to_save()

    def _begin_save(self, learner: Learner) -> None:
        urgent, self._save_now = self._save_now or bool(self._asked), False
        self._saving, self._asked = self._asked, []
        current = self.keeper.checkpoints.current()
        if not self._unsaved(learner) and current is not None:
            self._answer(current, learner.progress.steps, unchanged=True)
            log.info("checkpoint.unchanged", path=str(current), step=self._saved_step)
            return
        self._tried_step, self._tried_at = (
            learner.progress.steps,
            time.monotonic(),
        )  # a full disk: when the next is due
        self.keeper.start_saving(learner, self._about(learner), urgent=urgent)

    def _after_save(self, saved: Saved | CheckpointError) -> bool:
        metrics.checkpoints.labels(outcome="failed" if isinstance(saved, CheckpointError) else "saved").inc()
        if isinstance(saved, CheckpointError):
            log.error("checkpoint.failed", step=self._tried_step, error=str(saved))
            for command in self._saving:
                command.refuse(str(saved))
            self._saving = []
            return False
        self._saved_step = saved.step
        self._answer(saved.path, saved.step, unchanged=False)
        return True

    def _answer(self, path: Path, step: int, unchanged: bool) -> None:
        for command in self._saving:
            command.done(generation=generation.number(path), step=step, path=str(path), unchanged=unchanged)
        self._saving = []

    def _about(self, learner: Learner) -> dict[str, Any]:
        """What state.json says besides."""
        return {
            "base_path": str(learner.folder),
            "base_digest": self.ledger.get_meta("base_digest"),
            "source": asdict(learner.arena.layout.source),
            "config": self.config.model_dump(mode="json"),
            "versions": {"hogwild": __version__, **{name: metadata.version(name) for name in _VERSIONS}},
        }

    def _shut_down(self, save: bool) -> int:
        """Finish the examples under way, checkpoint, let go. The server keeps the memory."""
        began = time.monotonic()
        code, learner = 0, self.learner
        if learner is not None:
            if not learner.stop(_STOP_TIMEOUT_S):
                log.error(
                    "daemon.failed", error=f"a trainer thread did not end within {_STOP_TIMEOUT_S:.0f} s"
                )
                code = 1
            if (saved := self.keeper.saved(wait=True)) is not None:
                self._after_save(saved)
            if save and learner.failure is None and self._unsaved(learner):
                saved = self.keeper.save(learner, self._about(learner))
                kept = self._after_save(saved)
                if learner.judge.tripped is not None and not self._stuck:
                    self._probes_fell(learner, go_on=False)
                    kept = not self._stuck
                code = max(code, 0 if kept else 1)
        self.keeper.close()
        for command in (*self._asked, *self._saving):
            command.refuse("the daemon is stopping")
        self.commands.close()
        self.hub.stop()
        self.ledger.close()
        log.info("daemon.stopped", code=code, seconds=round(time.monotonic() - began, 1))
        return code

    # --- systemd -------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Is everything there that this service is for: weights to train, and a spool that has been looked at?"""
        return self.learner is not None and self.spool.scanned.is_set()

    def _status_line(self) -> str:
        learner = self.learner
        return status_line.compose(
            self._status,
            attached=learner is not None,
            training=learner is not None and learner.training,
            server=self._server.get("url", "") if self._server_here else None,
            refused=self._refused,
            scanned=self.spool.scanned.is_set(),
            saving=self.keeper.saving,
            stopping=self._stop or bool(self._failure),
            socket=str(self.config.socket),
        )

    # --- small things --------------------------------------------------------------------------------------------

    def _flag(self, name: str) -> Callable[[int, object], None]:
        def handler(_number: int, _frame: object) -> None:
            setattr(self, name, True)

        return handler

    def _beat(self) -> None:
        """Tell the server that this process lives, also while a checkpoint is written; and end weight epochs."""
        while True:
            if (learner := self.learner) is not None:
                learner.arena.control.beat_daemon()
                learner.progress.tick()
            time.sleep(_BEAT_S)

    def _reread(self) -> None:
        """SIGHUP: take over what can change live, and name what cannot."""
        if self._watchdog.is_ready:
            self._systemd.reloading()
        try:
            self._take_over_settings()
        finally:
            if self._watchdog.is_ready:
                self._systemd.ready(self._status_line())

    def _take_over_settings(self) -> None:
        try:
            fresh = configuration.load(self._config_path, self._overrides)
        except ConfigError as error:
            log.error("config.rejected", error=str(error))
            return
        live = {
            "checkpoint": fresh.checkpoint,
            "history": fresh.history,
            "governor": fresh.governor,
            "log": fresh.log,
        }
        restart = [
            name
            for name in type(fresh).model_fields
            if name not in live and getattr(fresh, name) != getattr(self.config, name)
        ]
        self.config = self.config.model_copy(update=live)
        self.keeper.configure(self.config)
        if self.learner is not None:
            self.learner.governor.configure(fresh.governor)
        logs.configure(fresh.log.level, fresh.log.format)
        log.info("config.reloaded", live=sorted(live), needs_restart=restart)

    def _write_status(self, learner: Learner) -> None:
        """For `hogwild status` and for Prometheus."""
        now = time.monotonic()
        if now - self._wrote_status_at < _STATUS_S:
            return
        self._wrote_status_at = now
        status = self._collector.of(learner, self._server, self._saved_step, stuck=self._stuck)
        self._status = status
        path = self.config.state_dir / "status.json"
        fresh = path.with_suffix(".tmp")
        try:
            fresh.write_text(json.dumps(status) + "\n")
            fresh.rename(path)
        except OSError as error:  # a full disk is no reason to stop learning
            log.warning("status.unwritten", path=str(path), error=str(error))
            self._wrote_status_at = now + _STATUS_RETRY_S - _STATUS_S
