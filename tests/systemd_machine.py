"""A machine with a real systemd, in namespaces of this one, with hogwild installed from its wheel."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support import wait_until

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "systemd_boot.sh"
PYTHON, PACKAGES, WHEELS = "/opt/test/python", "/opt/test/packages", "/opt/test/wheels"
PROGRAM = "/opt/hogwild/bin/hogwild"


def possible() -> str:
    """Why no systemd can be booted here; "" if it can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and mounts"
    if not Path("/lib/systemd/systemd").exists():
        return "needs systemd and dbus (apt-get install systemd dbus)"
    missing = [
        name for name in ("unshare", "nsenter", "systemd-analyze", "dbus-daemon") if not shutil.which(name)
    ]
    if missing:
        return f"needs {', '.join(missing)}"
    ran = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--cgroup", "mount", "--make-rprivate", "/"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {ran.stderr.strip()}" if ran.returncode else ""


class Machine:
    """Booted when made; `stop` it.

    Args:
        base: an empty folder.
        binds: folder here -> where it is seen inside, read-only.
    """

    def __init__(self, base: Path, binds: Mapping[Path, str]) -> None:
        self._base = base
        pairs = [f"{here}:{there}" for here, there in binds.items()]
        subprocess.run([SCRIPT, "boot", base, *pairs], check=True)

    def stop(self) -> None:
        subprocess.run([SCRIPT, "stop", self._base], check=True)

    def run(
        self, *command: str, stdin: str | None = None, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        ran = subprocess.run(
            [SCRIPT, "exec", self._base, *command],
            input=stdin if stdin is not None else "", capture_output=True, text=True, check=False,
        )  # fmt: skip
        if check and ran.returncode:
            raise AssertionError(f"{' '.join(command)}: {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Run something beside the test."""
        return subprocess.Popen(
            [SCRIPT, "exec", self._base, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def write(self, path: str, text: str) -> None:
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("sh", "-c", f"cat > {path}", stdin=text)

    # --- hogwild ---------------------------------------------------------------------------------------------

    def install_wheel(self) -> None:
        """A fresh virtual environment in /opt/hogwild, with the wheel in it. The heavy packages are not downloaded
        again: a .pth file adds the folder of those that the tests run with. This checkout is not among them."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.write(
            "/etc/ld.so.conf.d/test-python.conf", f"{PYTHON}/lib\n"
        )  # its libpython lies elsewhere here
        self.run("ldconfig")
        self.run(f"{PYTHON}/bin/{version}", "-m", "venv", "--without-pip", "/opt/hogwild")
        self.write(f"/opt/hogwild/lib/{version}/site-packages/heavy.pth", PACKAGES + "\n")
        (wheel,) = self.run("sh", "-c", f"ls {WHEELS}/*.whl").stdout.split()
        self.run(
            "/opt/hogwild/bin/python", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "-I",
            "--root-user-action=ignore", wheel,
        )  # fmt: skip

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "-P", name, unit).stdout.strip()

    def pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID"))

    def journal(self, unit: str) -> str:
        """Everything that the service, not systemd about it, has written."""
        return self.run("journalctl", "--no-pager", "-o", "cat", f"_SYSTEMD_UNIT={unit}.service").stdout

    def about(self, unit: str) -> str:
        """What systemd says about it."""
        return self.run("journalctl", "--no-pager", "-o", "cat", f"UNIT={unit}.service").stdout

    def events(self, name: str, pid: int | None = None) -> list[dict[str, Any]]:
        """The daemon's events, through the pipe that the documentation names."""
        mine = f" _PID={pid}" if pid else ""
        shell = (
            f"journalctl --no-pager -o cat _SYSTEMD_UNIT=hogwild.service{mine} | "
            f"jq -c 'select(.event == \"{name}\")'"
        )
        return [
            json.loads(line) for line in self.run("bash", "-o", "pipefail", "-c", shell).stdout.splitlines()
        ]

    def wait_for(self, name: str, pid: int | None = None, **fields: Any) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = [e for e in self.events(name, pid) if all(e.get(k) == v for k, v in fields.items())]
            return found[0] if found else None

        try:
            result: dict[str, Any] = wait_until(look, f"{name} {fields}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal('hogwild')[-6000:]}") from None
        return result

    def drop(self, user: str, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """As somebody would: cp into the spool."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.run(
            "sh", "-c", f"umask 022; cat > /home/{user}/{name}; chown {user}: /home/{user}/{name}", stdin=text
        )
        self.run(
            "runuser", "-u", user, "--", "cp", f"/home/{user}/{name}", "/var/lib/hogwild/spool/incoming/"
        )


def binds(model: Path, wheels: Path) -> dict[Path, str]:
    """Folders that a machine needs for `install_wheel`, and the model as /srv/model."""
    return {
        Path(sys.base_prefix): PYTHON,
        Path(sysconfig.get_paths()["purelib"]): PACKAGES,
        wheels: WHEELS,
        model: "/srv/model",
    }


STOPS_A_THREAD = """
import ctypes, json, os, sys, time, urllib.request
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
pid, tid, url = sys.argv[1:4]
named = {}
for one in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
    try:
        named.setdefault(open(f"/proc/{pid}/task/{one}/comm").read(), one)  # its children may be called so, too
    except OSError:
        continue  # it ended
others = [pid, *(one for name, one in named.items() if name.startswith("trainer-") and one != tid)]


def turns():
    status = [open(f"/proc/{pid}/task/{one}/status").read() for one in others]
    return [int(text.split("\\nvoluntary_ctxt_switches:")[1].split()[0]) for text in status]


while True:
    assert libc.ptrace(16, int(tid), None, None) == 0, ctypes.get_errno()  # PTRACE_ATTACH: this thread alone stops
    os.waitpid(int(tid), 0x40000000)
    time.sleep(7)  # the loop writes its status every 5 s, and asks the ledger for it
    before = turns()
    time.sleep(2)
    age_s = json.load(urllib.request.urlopen(url + "/hogwild/status"))["daemon"]["age_s"]
    if age_s < 3 and all(now > was for was, now in zip(before, turns())):
        break  # the heartbeat goes on, so it does not hold the interpreter's lock; and no other that the loop needs
    assert libc.ptrace(17, int(tid), None, None) == 0
    time.sleep(0.5)
print("stopped", flush=True)
os.waitpid(int(tid), 0x40000000)  # until it has been killed
"""
"""Stops one thread of the daemon for good, as a lock that never comes would: the daemon's pid, the thread's tid, the
server's URL.

Not while it holds a lock that others need, such as the ledger's in a commit: those would hang too, and be named too.
"""
