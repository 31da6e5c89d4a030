"""Starts daemons and servers fast: a process that has imported everything, and forks for each start.

Only the imports are saved (5 s of a daemon, 30 s of vLLM). What runs in the child is the program itself, from its
command line on: `hogwild ...` or `vllm serve ...`. The child is a session of its own, killed like any other process.

    python zygote.py daemon|server     then one JSON object a line on stdin: {"argv": [...], "env": {...}, "log": path}
                                       and one line on stdout for each: the process id
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from support import shared_files

DAEMON_MODULES = ("hogwild.cli", "hogwild.supervisor", "torch", "transformers.models.llama.modeling_llama")
SERVER_MODULES = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn", "vllm.model_executor.model_loader.default_loader",
    "vllm.v1.sample.sampler", "vllm.compilation.decorators", "transformers",
)  # fmt: skip


def main(kind: str) -> None:
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    preload(kind)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            be(kind, order["argv"], order["env"], order["log"])
        print(child, flush=True)


def preload(kind: str) -> None:
    if kind == "server":
        from hogwild.vllm_plugin import launch

        launch._provide_vllm_metadata()
    for name in DAEMON_MODULES if kind == "daemon" else SERVER_MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or the first full collection of each child writes to every page, and makes it a page of its own


def be(kind: str, argv: Sequence[str], env: Mapping[str, str], log: str) -> None:
    code = 70
    try:
        _die_with_parent()
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(fd, target)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = list(argv)
        if kind == "daemon":
            from forks import renew_autograd
            from hogwild.cli import main as run

            renew_autograd()
        else:
            from hogwild.vllm_plugin.launch import run
        code = 0
        run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        code = 70
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _die_with_parent() -> None:
    """So that a test that is itself killed leaves no server behind."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Zygote:
    """The caller's side."""

    def __init__(self, kind: str, env: Mapping[str, str]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), kind],
            env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._ready = False

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> "Forked":
        assert self.popen.stdin is not None
        self.wait_ready()
        self.popen.stdin.write(json.dumps({"argv": list(argv), "env": dict(env), "log": str(log)}) + "\n")
        self.popen.stdin.flush()
        return Forked(int(self._line()), log)

    def wait_ready(self) -> None:
        while not self._ready:
            self._ready = self._line() == "ready"

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def _line(self) -> str:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, "the zygote has ended"
        return line.strip()


class Forked:
    """A child of a zygote; known by a descriptor, because a process id is given to others later."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self._fd = os.pidfd_open(pid)
        self.started = time.monotonic()

    def wait(self, timeout_s: float) -> bool:
        """Has it ended within that time?"""
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    @property
    def alive(self) -> bool:
        return not self.wait(0)

    def signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            pass

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. What it shares in /dev/shm, nobody else would take away."""
        shared = shared_files(self.pid) if self.alive else set()
        self.signal(signal.SIGKILL)
        assert self.wait(60), f"process {self.pid} does not go"
        for path in shared:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
elif __name__ == "__mp_main__":  # as launch.py does, whose place this file has in such a child
    from hogwild.vllm_plugin import orphan

    orphan.end_with_server()
