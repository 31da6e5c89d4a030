"""The daemon: knows every stage and turns the loop. Stages know nothing of it.

Signal handlers only set flags; `turn` is one round of the loop and can be called without threads or signals.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hogwild import __version__, leftovers, metrics, pulse, rollback, running, state_lock, status_line
from hogwild import config as configuration
from hogwild import log as logs
from hogwild.arena import protocol
from hogwild.arena.hub import Hub
from hogwild.attachment import Attachment
from hogwild.checkpoint_schedule import CheckpointSchedule
from hogwild.commands import Command, Commands
from hogwild.curriculum import Curriculum
from hogwild.errors import ConfigError, HogwildError, LedgerError, SpoolError, SpoolTakenError
from hogwild.going_back import GoingBack
from hogwild.keeper import Keeper
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.notify import Notifier
from hogwild.settings import Config
from hogwild.spool import Spool
from hogwild.spool_lock import SpoolLock
from hogwild.status import Status, Troubles
from hogwild.watchdog import Watchdog

log = logs.get(__name__)

_TURN_S = 0.1
_BEAT_S = 1.0
_STOP_TIMEOUT_S = 120.0


class Supervisor:
    """One daemon, on one state folder.

    Args:
        config: effective configuration.
        config_path: re-read on SIGHUP; None if there is no file.
        overrides: what the command line said, which still counts then.

    Raises:
        HogwildError: the state folder is in use or unusable, or the spool is in use.
    """

    def __init__(
        self,
        config: Config,
        config_path: Path | None = None,
        overrides: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.config, self._config_path, self._overrides = config, config_path, overrides
        self._lock_file = state_lock.take(config.state_dir)
        self.ledger = Ledger(config.state_dir / "ledger.sqlite")
        lock = SpoolLock(config.spool.dir)
        self.spool = Spool(
            config.spool,
            self.ledger,
            passes=config.training.passes,
            on_accepted=lambda _file: self.curriculum.wake(),
            hold=lock.hold,
            let_go=lock.let_go,
        )
        self._claim_spool()
        leftovers.sweep(config.state_dir, config.spool.dir)
        self.keeper = Keeper(config)
        rollback.finish_on_disk(self.ledger, self.keeper)
        self.curriculum = Curriculum(
            self.ledger, config.replay, seed=config.training.seed, step_tokens=config.training.step_tokens
        )
        self.commands = Commands()
        self.schedule = CheckpointSchedule(config, self.ledger, self.keeper)
        self.attachment = Attachment(config, self.ledger, self.keeper, self.curriculum, self.schedule)
        self.going_back = GoingBack(self.ledger, self.keeper, self.schedule, self.attachment)
        self.hub = Hub(config.socket, self.attachment.offered, self.attachment.on_session, self.commands.ask)
        self._stop = self._reload = False
        self._failure = ""
        self._spool_failure: LedgerError | None = None
        self._status = Status(config, self.ledger)
        self._systemd = Notifier()
        self._watchdog = Watchdog(self._systemd, self._ready, self._status_line)

    def _claim_spool(self) -> None:
        """Before anything in it is touched: what looks left over may be another daemon's, at work."""
        try:
            self.spool.claim()
        except SpoolTakenError:
            raise
        except (SpoolError, OSError):
            pass  # not mounted, or not ours to write: the spool's thread says so, and goes on once that is mended

    def run(self) -> int:
        """Serve until TERM or INT. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _flag(self, "_stop"))
        signal.signal(signal.SIGHUP, _flag(self, "_reload"))
        signal.signal(signal.SIGUSR1, _flag(self.schedule, "save_now"))
        log.info(
            "daemon.started",
            version=__version__,
            pid=os.getpid(),
            spool=str(self.config.spool.dir / "incoming"),
            socket=str(self.config.socket),
            state=str(self.config.state_dir),
            queued=self.ledger.counts().pending,
        )
        self._leave_word()
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
                code = self._shut_down(code)
        self._watchdog.end("stopped" if code == 0 else f"failed: {self._failure or 'see the log'}")
        return code

    def _turn_until_stopped(self, spool_thread: threading.Thread) -> int:
        try:
            while not self._stop:
                pulse.beat()
                self.turn()
                if not spool_thread.is_alive():
                    raise self._spool_failure or HogwildError(
                        "the spool thread ended; see the log line before this one"
                    )
                time.sleep(_TURN_S)
        except Exception as error:
            self._failed(error)
            return 1
        return 0

    def _failed(self, error: Exception) -> None:
        """Say why the service cannot go on; where that was not foreseen, with the place."""
        foreseen = isinstance(error, HogwildError)
        self._failure = str(error) if foreseen else repr(error)
        log.error("daemon.failed", error=self._failure, exc_info=not foreseen)

    def _watch_spool(self, stop: threading.Event) -> None:
        with pulse.watched("spool"):
            try:
                self.spool.run(stop)
            except LedgerError as error:  # a full disk, mostly; after a stop, it is closed
                # The file that was being read is read again by the next daemon.
                self._spool_failure = None if stop.is_set() else error

    def turn(self) -> None:
        """One round: what signals and commands asked for, verification that is due, checkpoints that are due.

        Raises:
            HogwildError: the service cannot go on.
        """
        if self._reload:
            self._reload = False
            self._reread()
        while (command := self.commands.next()) is not None:
            if command.given_up():
                log.warning("command.dropped", command=command.name, waited_s=round(command.age_s, 1))
                command.refuse("nobody waits for it")
                continue
            with pulse.away():
                self._obey(command)
            self._status.expire()
        learner = self.attachment.learner
        if learner is None:
            self._status.write_waiting(self._status_line(), self._troubles())
            return
        if isinstance(learner.failure, LedgerError):
            raise learner.failure
        if learner.failure is not None:
            raise HogwildError(f"a trainer thread died ({learner.failure!r}): its layer may be half-written")
        if learner.judge.tripped is not None and not self.going_back.stuck:
            with pulse.away():
                self.going_back.on_trip(learner, go_on=True)
            self._status.expire()
        if self.attachment.must_check:
            self.attachment.check(after="attach")
        if self.schedule.collect():
            self._status.expire()
            if not self._stop:
                self.attachment.check(after="checkpoint")
        if not self.keeper.saving and self.schedule.due(learner):
            self.schedule.begin(learner)
        self._status.write(
            learner,
            protocol.shown(self.attachment.server) if self.attachment.connected else {},
            self.schedule.saved_step,
            self._troubles(),
        )

    def _troubles(self) -> Troubles:
        return Troubles(
            spool=self.spool.trouble,
            unwritten=self.schedule.unwritten,
            unrecorded=self.keeper.unrecorded,
            stuck=self.going_back.stuck,
            unasked=self.attachment.unasked,
            refused=self.hub.refused,
            prompts_differ=self.attachment.prompts_differ is not None,
        )

    def _obey(self, command: Command) -> None:
        """Do what a person asked for, or see that it is done.

        Raises:
            HogwildError: it failed half-way, and the service cannot go on.
        """
        if command.name == "checkpoint":
            if self.attachment.learner is None:
                command.refuse("no server has brought its weights yet: there is nothing to save")
            else:
                self.schedule.ask(command)
        elif command.name == "rollback":
            self.going_back.on_command(command)
        elif command.name == "retrain":
            self._retrain(command)
        else:
            command.refuse(f"this daemon ({__version__}) knows no command {command.name!r}")

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

    def _shut_down(self, code: int) -> int:
        """Finish the examples under way, checkpoint, let go. The server keeps the memory.

        Args:
            code: 1: the service has failed, and nothing is saved any more.

        Returns:
            The exit code.
        """
        began, learner = time.monotonic(), self.attachment.close()
        if learner is not None:
            try:
                code = max(code, self._finish(learner, save=code == 0))
            except Exception as error:
                self._failed(error)
                code = 1
        self.keeper.close()
        self.schedule.refuse("the daemon is stopping")
        self.commands.close()
        self.hub.stop()
        self.ledger.close()
        log.info("daemon.stopped", code=code, seconds=round(time.monotonic() - began, 1))
        return code

    def _finish(self, learner: Learner, *, save: bool) -> int:
        """The part of that which may fail; returns its exit code."""
        code = 0
        if not learner.stop(_STOP_TIMEOUT_S):
            log.error("daemon.failed", error=f"a trainer thread did not end within {_STOP_TIMEOUT_S:.0f} s")
            code = 1
        self.schedule.collect(wait=True)
        if save and learner.failure is None and self.schedule.unsaved(learner):
            kept = self.schedule.save(learner)
            if learner.judge.tripped is not None and not self.going_back.stuck:
                self.going_back.on_trip(learner, go_on=False)
                kept = not self.going_back.stuck
            code = max(code, 0 if kept else 1)
        return code

    # --- systemd -------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Is everything there that this service is for: weights to train, and a spool that has been looked at?"""
        return self.attachment.learner is not None and self.spool.scanned.is_set()

    def _status_line(self) -> str:
        learner = self.attachment.learner
        return status_line.compose(
            self._status.newest,
            attached=learner is not None,
            training=learner is not None and learner.training,
            server=self.attachment.server.get("url", "") if self.attachment.connected else None,
            refused=self.hub.refused,
            scanned=self.spool.scanned.is_set(),
            saving=self.keeper.saving,
            stopping=self._stop or bool(self._failure),
            socket=str(self.config.socket),
        )

    # --- small things --------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Tell the server that this process lives, also while a checkpoint is written; and end weight epochs."""
        while True:
            if (learner := self.attachment.learner) is not None:
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

    def _leave_word(self) -> None:
        try:
            running.leave_word(self.config, self._config_path)
        except OSError as error:  # a full disk is no reason not to learn
            log.warning("status.unwritten", path=str(self.config.state_dir / running.NAME), error=str(error))

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
        self.schedule.configure(self.config)
        self.attachment.configure(self.config)
        logs.configure(fresh.log.level, fresh.log.format)
        self._leave_word()
        log.info("config.reloaded", live=sorted(live), needs_restart=restart)


def _flag(owner: object, name: str) -> Callable[[int, object], None]:
    def handler(_number: int, _frame: object) -> None:
        setattr(owner, name, True)

    return handler
