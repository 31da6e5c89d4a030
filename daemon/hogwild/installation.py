"""`hogwild install` and `hogwild uninstall`: units, the user, folders, the configuration. Imports no torch.

    /etc/systemd/system/        hogwild.service, hogwild-vllm.service, hogwild.target
    /etc/sysusers.d/, /etc/tmpfiles.d/   hogwild.conf: the user and the folders, made by systemd's own tools
    /etc/hogwild/hogwild.toml   written once, never overwritten, never removed
    /usr/local/bin/hogwild      a link to the program, unless something is there

A file is replaced whole (written beside it, then renamed), so an interrupted install leaves the old one.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hogwild import presets
from hogwild.errors import HogwildError, UsageError
from hogwild.resources import resource

UNITS = ("hogwild.service", "hogwild-vllm.service", "hogwild.target")
PROGRAM = "/opt/hogwild/bin/hogwild"
"""What the units in systemd/ call; replaced by where this installation is."""
CONFIG = "etc/hogwild/hogwild.toml"
LINK = "usr/local/bin/hogwild"
STATE_DIR, SOCKET = "/var/lib/hogwild", "/run/hogwild/arena.sock"
ARGUMENTS = ("--host", "127.0.0.1", "--port", "8000")
"""What the server is told where no preset says more: vLLM would listen on every interface, and asks for no key."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""Folders that the units' ProtectHome= and PrivateTmp= hide from the service."""


class Installation:
    """An installation in `root`.

    Args:
        root: folder of the system that is installed into; None: this one.
        program: path of `hogwild` in that system; None: that of this process.
        dry_run: say everything, do nothing.
        say: takes one line for the person who installs.
    """

    def __init__(
        self, root: Path | None, program: Path | None, *, dry_run: bool, say: Callable[[str], object]
    ) -> None:
        self._live = root is None
        self._root = Path("/") if root is None else root.absolute()
        self._program = (program or this_program()).absolute()
        self._dry_run, self._say = dry_run, say

    def install(self, model: Path | None, preset: str | None) -> None:
        """Write everything, have systemd make the user and the folders, and say what comes next.

        Raises:
            UsageError: the service could not reach its program, or we may not write here.
        """
        if odd := re.search(r"[\s%$\"'\\]", str(self._program)):
            raise UsageError(
                f"--program {self._program}: units cannot call a path with {odd[0]!r} in it: install hogwild elsewhere"
            )
        if why := hidden(self._program, Path(os.path.realpath(sys.executable))):
            if self._live and not self._dry_run:
                raise UsageError(why)
            self._say(f"note: {why}")
        self._needs_root()
        for name in UNITS:
            self._write(f"etc/systemd/system/{name}", unit_text(name, self._program))
        for kind in ("sysusers", "tmpfiles"):
            self._write(
                f"etc/{kind}.d/hogwild.conf", resource(f"{kind}.d/hogwild.conf", "systemd").read_text("utf-8")
            )
        if (self._root / CONFIG).exists():
            self._did("kept", f"{self._shown(CONFIG)}, which is yours", "would keep")
            if model or preset:
                self._say(
                    "note: --model and --preset begin a configuration: what this one says stays as it is"
                )
        else:
            given: dict[presets.Key, object] = {("state_dir",): STATE_DIR, ("socket",): SOCKET}
            if preset is None:
                given["server", "arguments"] = list(ARGUMENTS)
            if model:
                given["model",] = str(model)
            self._write(CONFIG, presets.file(preset, given))
        self._link()
        where = [] if self._live else [f"--root={self._root}"]
        self._run("systemd-sysusers", *where, "hogwild.conf")  # which it finds in /etc/sysusers.d
        self._run("systemd-tmpfiles", *where, "--create", "hogwild.conf")
        self._reload()
        self._next(model)

    def uninstall(self) -> None:
        """Stop the services and remove what `install` wrote. Configuration and data stay, and the user who owns them.

        Raises:
            UsageError: we may not write here.
        """
        self._needs_root()
        program, link = called(self._root / "etc/systemd/system" / UNITS[0]), self._root / LINK
        if self._live and self._systemd_runs():
            self._run("systemctl", "disable", "--now", *UNITS, may_fail=True)
            self._run("systemctl", "reset-failed", *UNITS, may_fail=True)
        for name in UNITS:
            self._remove(f"etc/systemd/system/{name}")
        for kind in ("sysusers", "tmpfiles"):
            self._remove(f"etc/{kind}.d/hogwild.conf")
        if program is not None and link.is_symlink() and link.readlink() == program:
            self._remove(LINK)
        self._reload()
        self._say("")
        self._say(
            "kept: /etc/hogwild (configuration), /var/lib/hogwild (everything that was learned), and the user"
        )
        self._say("hogwild, who owns it. To remove these too:")
        self._say(
            "  rm -r /etc/hogwild /var/lib/hogwild /var/cache/hogwild /var/log/hogwild; userdel hogwild"
        )

    # --- one step each -------------------------------------------------------------------------------------------

    def _write(self, name: str, text: str) -> None:
        path = self._root / name
        old = path.read_text("utf-8") if path.is_file() else None
        if old == text:
            self._did("as it is", self._shown(name))
            return
        self._did("wrote" if old is None else "updated", self._shown(name), "would write")
        if self._dry_run:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_text(text, "utf-8")
            fresh.chmod(0o644)
            fresh.rename(path)
        except OSError as error:
            raise HogwildError(f"{path}: cannot be written: {error.strerror}") from error

    def _remove(self, name: str) -> None:
        path = self._root / name
        if not (path.exists() or path.is_symlink()):
            return
        self._did("removed", self._shown(name), "would remove")
        if not self._dry_run:
            path.unlink()

    def _link(self) -> None:
        link = self._root / LINK
        if link.exists() or link.is_symlink() or self._program == Path("/") / LINK:
            return
        self._did("linked", f"{self._shown(LINK)} -> {self._program}", "would link")
        if not self._dry_run:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(self._program)

    def _run(self, command: str, *arguments: str, may_fail: bool = False) -> None:
        shown = " ".join([command, *arguments])
        if self._dry_run:
            self._did("", shown, "would run")
            return
        if shutil.which(command) is None:
            if self._live:
                raise HogwildError(f"there is no program {command}: this needs systemd")
            self._did("left out", f"{shown}: there is no such program here; run it in the image")
            return
        ran = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
        self._did("ran", shown)
        if ran.returncode and not may_fail:
            raise HogwildError(f"`{shown}` failed with {ran.returncode}: {ran.stderr.strip()}")

    def _reload(self) -> None:
        if self._live and self._systemd_runs():
            self._run("systemctl", "daemon-reload")

    def _next(self, model: Path | None) -> None:
        self._say("")
        self._say("next:")
        if model is None:
            self._say(f'  edit {self._shown(CONFIG)}: model = "/path/of/the/model"')
        self._say("  hogwild doctor                                     # is everything there?")
        self._say("  systemctl enable --now hogwild.target              # start both, now and at every boot")
        self._say(
            "  usermod --append --groups hogwild YOUR_NAME        # may drop files, after the next login"
        )
        self._say(f"  cp facts.jsonl {STATE_DIR}/spool/incoming/")

    def _did(self, done: str, what: object, would: str = "") -> None:
        self._say(f"{would if self._dry_run and would else done:12} {what}")

    # --- small things --------------------------------------------------------------------------------------------

    def _needs_root(self) -> None:
        if self._live and not self._dry_run and os.geteuid() != 0:
            raise UsageError("this writes to /etc: run it as root (sudo), or with --root DIR, or --dry-run")

    def _systemd_runs(self) -> bool:
        return Path("/run/systemd/system").is_dir()  # as sd_booted(3)

    def _shown(self, name: str) -> Path:
        return self._root / name


def unit_text(name: str, program: Path) -> str:
    """A unit as it is installed."""
    return resource(name, "systemd").read_text("utf-8").replace(PROGRAM, str(program))


def called(unit: Path) -> Path | None:
    """The program that an installed unit calls; None if it is not installed."""
    lines = unit.read_text("utf-8").splitlines() if unit.is_file() else []
    words = next((line.split() for line in lines if line.startswith("ExecStart=")), [""])
    return Path(words[0].removeprefix("ExecStart=")) if words[0] else None


def this_program() -> Path:
    """The `hogwild` beside the running Python."""
    return Path(sys.executable).absolute().with_name("hogwild")


def hidden(*paths: Path) -> str:
    """Why the service's user cannot run what lies at these paths; "" if it can."""
    for path in paths:
        above = next((one for one in HIDDEN if path.is_relative_to(one)), None)
        shut = next(
            (one for one in reversed(path.parents) if one.is_dir() and not one.stat().st_mode & 0o001), None
        )
        if above or shut:
            reason = (
                f"the units hide {above} from the service" if above else f"other users may not enter {shut}"
            )
            return (
                f"the service cannot run {path}: {reason}. Install hogwild where everybody may read it: "
                "python3 -m venv /opt/hogwild && /opt/hogwild/bin/pip install 'hogwild[cpu]', with a Python such as "
                "/usr/bin/python3"
            )
    return ""
