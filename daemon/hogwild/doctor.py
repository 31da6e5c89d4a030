"""`hogwild doctor`: everything that can be wrong, looked at before it is, each with what mends it. Imports no torch.

Nothing is changed. Checks are functions that return findings; one that fails itself is a finding too.
"""

import errno
import functools
import json
import os
import pwd
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hogwild import config as configuration
from hogwild import probe_file, running, service_environment, state_lock
from hogwild.errors import ConfigError, HogwildError
from hogwild.settings import Config

UNIT = Path("/etc/systemd/system/hogwild.service")


@dataclass(frozen=True)
class Finding:
    """What one look came to.

    Attributes:
        level: "fail": it will not work; "warn": it may not, or not well; "ok".
        what: was looked at.
        found: there.
        fix: what to do; empty if nothing.
    """

    level: Literal["ok", "warn", "fail"]
    what: str
    found: str
    fix: str = ""


def ok(what: str, found: object) -> Finding:
    return Finding("ok", what, str(found))


def warn(what: str, found: object, fix: str) -> Finding:
    return Finding("warn", what, str(found), fix)


def fail(what: str, found: object, fix: str) -> Finding:
    return Finding("fail", what, str(found), fix)


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        config: effective.
        user: who the service runs as: that of the installed unit, else who asks.
        quick: leave out what takes seconds.
        environment: what the units load beside this configuration.
    """

    config: Config
    user: pwd.struct_passwd
    quick: bool
    environment: Mapping[str, str] = field(default_factory=dict)

    def variable(self, name: str) -> str:
        """Of this process, or else what the units are given; empty: neither has it, or it may not be read."""
        return os.environ.get(name) or self.environment.get(name, "")

    def daemon(self) -> int | None:
        """Process id of the daemon that works in the state folder; None: none does, or it cannot be seen."""
        folder = self.config.state_dir
        return state_lock.holder(folder) if os.access(folder, os.X_OK) else None

    @functools.cached_property
    def status(self) -> dict[str, Any]:
        """What the daemon says of itself; empty where none runs or it cannot be read."""
        try:
            pid = self.daemon()
            return running.status(self.config.state_dir, pid) if pid is not None else {}
        except (OSError, HogwildError):
            return {}

    def may(self, path: Path, mode: int) -> bool:
        """As `os.access`, for the service's user.

        Raises:
            PermissionError: we are neither root nor that user, and cannot tell.
        """
        if self.user.pw_uid == os.geteuid():
            return os.access(path, mode)
        if os.geteuid() != 0:
            raise PermissionError(
                errno.EPERM, f"what user {self.user.pw_name} may do there, only root can say", str(path)
            )
        child = os.fork()
        if child == 0:
            try:
                os.initgroups(self.user.pw_name, self.user.pw_gid)
                os.setgid(self.user.pw_gid)
                os.setuid(self.user.pw_uid)
                os._exit(0 if os.access(path, mode) else 1)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


Check = Callable[[Subject], Iterable[Finding]]


def examine(path: Path | None, *, quick: bool, as_json: bool, model: Path | None = None) -> int:
    """Run every check and print what it finds. Returns the exit code: 1 if anything fails.

    Args:
        path: configuration file; None: defaults and environment.
        model: look at this model alone, and ask vLLM what would be trained of it.
    """
    from hogwild import doctor_folders, doctor_machine, doctor_model, doctor_service

    show = _Json() if as_json else _Console()
    config, found = _configuration(path)
    loaded, beside = _environment(path)
    findings = [found, *beside]
    for one in findings:
        show.add(one)
    subject = Subject(config, _service_user(), quick, loaded)
    checks: tuple[Check, ...]
    checks = (*doctor_machine.CHECKS, *doctor_folders.CHECKS, *doctor_service.CHECKS)
    if model is not None:
        checks = (functools.partial(doctor_model.model, model),)
    for check in checks:
        for one in look(check, subject):
            findings.append(one)
            show.add(one)
    show.end(findings)
    return 1 if any(one.level == "fail" for one in findings) else 0


def _configuration(path: Path | None) -> tuple[Config, Finding]:
    """What is examined. Where there is no file, the daemon that runs says: in the state folder, or, where nobody named
    one, the only one there is."""
    try:
        config = configuration.load(path)
        probe_file.check(config)
    except ConfigError as error:
        advice = "mend what is named; `hogwild config` shows the rest"
        return configuration.usable(path), fail("configuration", error, advice)
    if path is not None:
        return config, ok("configuration", path)
    named = any(keys == ("state_dir",) for keys in configuration.gather(None)[1])
    daemons = [one] if (one := running.in_folder(config.state_dir)) else [] if named else running.anywhere()
    if len(daemons) > 1:
        said = ", ".join(f"{one.pid} in {one.config.state_dir}" for one in daemons)
        return config, warn(
            "configuration", f"no file, and several daemons run ({said}): defaults and environment",
            "name the one that is meant: --config, or $HOGWILD_STATE_DIR",
        )  # fmt: skip
    if daemons:
        (one,) = daemons
        source = f" ({one.file})" if one.file else ""
        return one.config, ok(
            "configuration", f"no file: that of the running daemon, process {one.pid}{source}"
        )
    return config, ok("configuration", "no file: defaults and environment")


def _environment(path: Path | None) -> tuple[Mapping[str, str], list[Finding]]:
    """What the units load beside this file, and what to say of it."""
    beside = service_environment.beside(path, configuration.SYSTEM_FILE)
    if beside is None:
        return {}, []
    try:
        found = service_environment.read(beside)
    except PermissionError:
        return {}, [
            warn(
                "environment", f"{beside} cannot be read: what it sets is missing here", "sudo hogwild doctor"
            )
        ]
    return found, [ok("environment", f"{beside} sets {', '.join(found) or 'nothing'}")]


def look(check: Check, subject: Subject) -> list[Finding]:
    """What a check finds; that it could not look, where it could not: the next one may say why."""
    name = getattr(check, "__name__", "model").replace("_", " ")
    try:
        return list(check(subject))
    except (PermissionError, HogwildError) as error:  # of the latter, that of a lock that may not be read
        why = f"{error.filename}: {error.strerror}" if isinstance(error, PermissionError) else error
        return [warn(name, f"could not be looked at: {why}", "sudo hogwild doctor")]
    except Exception as error:
        return [
            warn(name, f"could not be looked at: {error!r}", "report it, if nothing else here explains it")
        ]


def by_owner(path: Path, command: str, instead: str = "") -> str:
    """A command as advice to whoever asks: on what is somebody else's, root has to give it.

    Args:
        instead: what anybody can do.
    """
    owner = 0 if command.startswith(("chown", "install")) else path.stat().st_uid
    if os.geteuid() in (0, owner):
        return command
    return f"as root: {command}{f'; or {instead}' if instead else ''}"


def _service_user() -> pwd.struct_passwd:
    if UNIT.is_file():
        try:
            return pwd.getpwnam("hogwild")
        except KeyError:
            pass  # the check of the units says so
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError:
        return pwd.struct_passwd((f"uid {os.geteuid()}", "x", os.geteuid(), os.getegid(), "", "/", ""))


_MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


class _Console:
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)

    def add(self, one: Finding) -> None:
        from rich.markup import escape

        self._console.print(f"{_MARKS[one.level]}  {one.what}: {escape(one.found)}")
        if one.fix:
            self._console.print(f"        [bold]{escape(one.fix)}[/]")

    def end(self, findings: list[Finding]) -> None:
        counts = {level: sum(one.level == level for one in findings) for level in ("ok", "warn", "fail")}
        self._console.print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend")


class _Json:
    def add(self, one: Finding) -> None:
        pass

    def end(self, findings: list[Finding]) -> None:
        print(json.dumps([asdict(one) for one in findings]))
