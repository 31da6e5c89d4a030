"""Real processes for the tests: the daemon and the server, started as a user starts them."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

DEADLINE_S = 300.0  # generous: machines are noisy, and no test is about how long something takes

# Small and quick to start; what a user would leave out.
SERVER_ARGUMENTS = (
    "--served-model-name", "demo", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", str(256 << 20), "--distributed-executor-backend", "uni",
)  # fmt: skip

AS_SHIPPED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""Of a server: an engine with a worker process, as vLLM has it on a CPU; without, tests do with one process less."""


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` is true; its value is returned. To look costs others at most a fifth of the processor: a
    command that is asked takes it from what is waited for."""
    deadline = time.monotonic() + deadline_s
    while (began := time.monotonic()) < deadline:
        if value := condition():
            return value
        time.sleep(min(max(0.2, 4 * (time.monotonic() - began)), 2.0))
    raise AssertionError(f"not within {deadline_s:.0f} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE" and not k.startswith("HOGWILD_")
    }
    return {**kept, **extra}


class Process:
    """A child in a session of its own, with its output in a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                list(command),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def group(self) -> list[int]:
        """Every process of this child's session."""
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    pids.append(int(entry.name))
        return pids

    def kill(self) -> None:
        """SIGKILL to every process of the session, as the kernel's out-of-memory killer or an operator would.

        What vLLM shares in /dev/shm would stay there for ever: whoever takes it away is killed, too.
        """
        pids = self.group()
        shared = {path for pid in pids for path in shared_files(pid)}
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.popen.wait()
        wait_until(lambda: not self.group(), "the session is gone")
        for path in shared:
            path.unlink(missing_ok=True)

    def terminate(self) -> int:
        """SIGTERM to the main process, as systemd sends it; its exit code."""
        if self.alive:
            self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(timeout=DEADLINE_S)


class Daemon(Process):
    """`hogwild serve`, logging JSON."""

    def __init__(self, root: Path, sock: Path, **settings: Any) -> None:
        self.state = root / "state"
        self.spool = self.state / "spool"
        root.mkdir(parents=True, exist_ok=True)
        env = {
            "HOGWILD_STATE_DIR": str(self.state),
            "HOGWILD_SOCKET": str(sock),
            "HOGWILD_METRICS__PORT": "0",  # several daemons run side by side
            **{f"HOGWILD_{key.upper()}": str(value) for key, value in settings.items()},
        }
        self.settings = env
        log = root / "daemon.log"
        self._read = log.stat().st_size if log.exists() else 0
        self._events: list[dict[str, Any]] = []
        super().__init__([sys.executable, "-m", "hogwild", "serve"], environment(**env), log)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What this daemon (not one before it) has logged; the last line may still be half-written."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        self._events += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        return [event for event in self._events if name in (None, event["event"])]

    def wait_for(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields; fails at once when the daemon ends."""

        def look() -> dict[str, Any] | None:
            for event in self.events(name):
                if all(event.get(key) == value for key, value in fields.items()):
                    return event
            if not self.alive:
                raise AssertionError(f"the daemon ended with {self.popen.returncode}:\n{self.tail()}")
            return None

        try:
            result: dict[str, Any] = wait_until(look, f"{name} {fields}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None
        return result

    def command(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """A command line of the same user, such as `hogwild rollback 3`."""
        return subprocess.run(
            [sys.executable, "-m", "hogwild", *map(str, arguments)],
            env=environment(**self.settings, COLUMNS="200", NO_COLOR="1"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def ask(self, *arguments: object) -> Any:
        """What such a command says with --json."""
        ran = self.command(*arguments, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    def drop(self, name: str, examples: Sequence[Mapping[str, Any]] | bytes) -> None:
        """Put a file into the spool the way a careful user does: rename it in."""
        incoming = self.spool / "incoming"
        wait_until(incoming.is_dir, "the spool exists")
        data = (
            examples
            if isinstance(examples, bytes)
            else b"".join(json.dumps(e).encode() + b"\n" for e in examples)
        )
        fresh = incoming / f".{name}.tmp"
        fresh.write_bytes(data)
        fresh.rename(incoming / name)


class Server(Process):
    """vLLM. With a socket: `hogwild vllm`; without: stock `vllm serve`, with no plugin at all."""

    def __init__(
        self,
        model: Path,
        log: Path,
        sock: Path | None,
        port: int | None = None,
        more: Sequence[str] = (),
        **settings: str,
    ) -> None:
        """`more`: arguments of vLLM; `settings`: variables of the environment."""
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [str(model), "--port", str(self.port), *SERVER_ARGUMENTS, *more]
        if sock is not None:
            command = [sys.executable, "-m", "hogwild", "vllm", *arguments]
            env = environment(HOGWILD_SOCKET=str(sock), **settings)
        else:
            command = [sys.executable, "-m", "hogwild.vllm_plugin.launch", "serve", *arguments]
            env = environment(VLLM_PLUGINS="", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", **settings)
        super().__init__(command, env, log)

    def wait_ready(self, deadline_s: float = DEADLINE_S) -> "Server":
        def ready() -> bool:
            if not self.alive:
                raise AssertionError(f"the server ended with {self.popen.returncode}:\n{self.tail()}")
            try:
                # Without TLS: to read all authorities' certificates takes longer than all the rest.
                return httpx.get(f"{self.url}/health", timeout=2, verify=False).is_success
            except httpx.HTTPError:
                return False

        wait_until(ready, "the server answers", deadline_s)
        return self

    def ask(self, question: str, begins: str = "") -> str:
        """The answer at temperature 0; how it goes on, if it is to begin with something."""
        messages = [{"role": "user", "content": question}]
        if begins:
            messages.append({"role": "assistant", "content": begins})
        response = httpx.post(
            f"{self.url}/v1/chat/completions",
            json={
                "model": "demo",
                "messages": messages,
                "max_tokens": 32,
                "temperature": 0,
                "continue_final_message": bool(begins),
                "add_generation_prompt": not begins,
            },
            timeout=DEADLINE_S,
        ).raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"]).strip()

    def tokens(self, question: str) -> list[str]:
        """The answer at temperature 0, token by token."""
        return [next(iter(likeliest)) for likeliest in self.candidates(question)]

    def candidates(self, question: str) -> list[dict[str, float]]:
        """The answer at temperature 0: for each token the likeliest ones with their log-probabilities, best first."""
        response = httpx.post(
            f"{self.url}/v1/chat/completions",
            json={
                "model": "demo",
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 32,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 5,
            },
            timeout=DEADLINE_S,
        ).raise_for_status()
        return [
            {item["token"]: item["logprob"]} | {top["token"]: top["logprob"] for top in item["top_logprobs"]}
            for item in response.json()["choices"][0]["logprobs"]["content"]
        ]

    def arena(self) -> Path:
        """The memfd of the weights, as a path under /proc that can be read."""
        for pid in self.group():
            for fd in (Path("/proc") / str(pid) / "fd").iterdir():
                try:
                    if str(fd.readlink()).startswith("/memfd:hogwild-weights"):
                        return fd
                except FileNotFoundError:
                    continue
        raise AssertionError("the server has no arena")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shared_files(pid: int) -> set[Path]:
    """Files in /dev/shm that the process has mapped."""
    try:
        lines = (Path("/proc") / str(pid) / "maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {
        Path(line.split()[-1]) for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")
    }


def shared_mappings(pid: int, name: str) -> Iterator[tuple[str, int]]:
    """(inode, resident KiB) of each mapping of `pid` whose name contains `name`."""
    inode = ""
    for line in (Path("/proc") / str(pid) / "smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and ":" not in fields[0]:
            inode = fields[4] if name in line else ""
        elif inode and fields[0] == "Rss:":
            yield inode, int(fields[1])


def copy_model(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


class Client:
    """Somebody who streams answers all the time, and minds every fault."""

    def __init__(self, url: str) -> None:
        self._url, self.faults, self.answers, self.tokens = url, list[str](), 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            body = {
                "model": "demo", "max_tokens": 24, "temperature": 0.7, "stream": True,
                "messages": [{"role": "user", "content": f"Tell me about the number {self.answers}."}],
            }  # fmt: skip
            try:
                with httpx.stream(
                    "POST", f"{self._url}/v1/chat/completions", json=body, timeout=DEADLINE_S
                ) as response:
                    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
                if response.status_code != 200 or lines[-1] != "[DONE]":
                    self.faults.append(f"{response.status_code}: {lines}")
                for line in lines[:-1]:
                    chunk = json.loads(line)
                    self.tokens += bool(chunk["choices"])
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                self.faults.append(repr(error))
            self.answers += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
