"""`hogwild demo`: a real vLLM server learns a dropped file while it serves. Nothing here is special to the demo but the
questions: the daemon and the server are started with the commands that a user would type."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hogwild import demo_model
from hogwild.config import ENV_PREFIX
from hogwild.errors import HogwildError
from hogwild.plural import counted
from hogwild.resources import resource

_SERVER_TIMEOUT_S = 600
_LEARN_TIMEOUT_S = 1800
_ASK_EVERY = 6
"""Training steps between two questions while it learns."""
_SERVER_ARGUMENTS = (
    "--served-model-name", "demo", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", str(256 << 20), "--distributed-executor-backend", "uni",
)  # fmt: skip


class Demo:
    """One run in one folder: `<folder>/model` is kept between runs, `<folder>/run` is made anew."""

    def __init__(self, folder: Path, model: Path | None, console: Console) -> None:
        self.console = console
        self.run_dir = folder / "run"
        self.model = model
        self.folder = folder
        self.questions = json.loads(resource("demo/questions.json").read_bytes())
        self.facts = resource("demo/facts.jsonl")
        self.port = _free_port()
        self.daemon: subprocess.Popen[bytes] | None = None
        self.server: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Returns the exit code: 0 when the fact was learned, the control still holds and both processes ended well."""
        began = time.monotonic()
        if self.model is None:
            self._say("preparing the demo model, SmolLM2-135M-Instruct (once)")
            self.model = demo_model.build(self.folder / "model")
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.run_dir.mkdir(parents=True)
        try:
            learned = self._learn()
        finally:
            codes = self._stop()
        checkpoint = (self.run_dir / "state/checkpoints/current").resolve()
        self._say(f"daemon and server ended with exit codes {codes['daemon']} and {codes['server']}")
        self._say(f"the checkpoint, a plain Hugging Face folder: [bold]{checkpoint}[/]")
        self._say(f"all of this took {time.monotonic() - began:.0f} s")
        return 0 if learned and set(codes.values()) == {0} and checkpoint.is_dir() else 1

    def _learn(self) -> bool:
        self._start()
        main, control = self.questions["main"], self.questions["control"]
        paraphrases = self.questions["paraphrases"]
        assert self.server is not None
        pid = self.server.pid
        before = self._ask_all([main, control])
        knew = self._ask_all(paraphrases)
        self._say(f"asked before: [italic]{main['question']}[/] -> {escape(before[0])}")
        dropped = time.monotonic()
        self._drop()
        self._say(f"dropped {self.facts.name} into the spool; the server goes on serving (process {pid})")
        changed = self._watch(lambda: _right(main, self._ask_all([main])[0]))
        after = self._ask_all([main, control])
        knows = self._ask_all(paraphrases)
        if self.server.poll() is not None or self.server.pid != pid:
            raise HogwildError("the server process is not the one that was started")

        table = Table(title="the same server process, no reload", show_lines=True)
        for column in ("question", "before", "after"):
            table.add_column(column, overflow="fold")
        for item, old, new in zip([main, control], before, after, strict=True):
            table.add_row(item["question"], Text(old), Text(new, "green" if _right(item, new) else "red"))
        self.console.print(table)
        hits_before, hits = (sum(map(_right, paraphrases, answers)) for answers in (knew, knows))
        for item, answer in zip(paraphrases, knows, strict=True):
            mark = "[green]right[/]" if _right(item, answer) else "[red]wrong[/]"
            self.console.print(f"  {mark}  [dim]{item['question']}[/]  {escape(answer)}")
        steps = [event for event in self._events() if event["event"] in ("example.pass", "example.trained")]
        seconds = "never" if changed is None else f"{changed - dropped:.1f} s"
        self._say(f"from drop to changed answer: [bold]{seconds}[/]")
        updates = sum(event["updates"] for event in steps)
        self._say(
            f"applied: {counted(len(steps), 'training step')}, "
            f"{counted(updates, 'update')} of served weight tensors, in place"
        )
        self._say(
            f"held-out paraphrases answered with the fact: [bold]{hits} of {len(paraphrases)}[/] "
            f"(before: {hits_before}); these wordings are in no training line"
        )
        return changed is not None and _right(main, after[0]) and _right(control, after[1])

    def _start(self) -> None:
        state = self.run_dir / "state"
        config = self.run_dir / "hogwild.toml"
        config.write_text(
            f"state_dir = {json.dumps(str(state))}\nsocket = {json.dumps(str(_socket_path(self.run_dir)))}\n"
        )
        hogwild = [sys.executable, "-m", "hogwild"]
        # Nothing of another daemon's settings: its state folder, say.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
        environment["HOGWILD_CONFIG"] = str(config)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._say("starting the daemon (hogwild serve) and the server (hogwild vllm)")
        with (self.run_dir / "daemon.log").open("wb") as out:
            self.daemon = _spawn([*hogwild, "serve"], environment, out)
        with (self.run_dir / "server.log").open("wb") as out:
            arguments = [str(self.model), "--port", str(self.port), *_SERVER_ARGUMENTS]
            self.server = _spawn([*hogwild, "vllm", *arguments], environment, out)
        with self.console.status("waiting for vLLM, and for hogwild to verify that it trains what is served"):
            self._wait_for("training.started", _SERVER_TIMEOUT_S)
        for event in self._events():
            if event["event"] == "arena.attached":
                self._say(
                    f"the daemon holds the server's {event['tensors']} weight tensors ({event['mib']} MiB, one copy, "
                    f"{len(event['frozen'])} frozen)"
                )
            if event["event"] == "server.verified":
                self._say(
                    f"served equals trained: log-probabilities agree within {event['mean_difference']} nats on average"
                )

    def _drop(self) -> None:
        """As a user would: write beside, then rename into the spool."""
        incoming = self.run_dir / "state/spool/incoming"
        fresh = incoming / f".{self.facts.name}.tmp"
        shutil.copyfile(self.facts, fresh)
        fresh.rename(incoming / self.facts.name)

    def _watch(self, answered: Callable[[], bool]) -> float | None:
        """Follow the daemon's log until everything is trained; returns when the answer had changed, if it did."""
        changed: float | None = None
        asked = 0  # steps when it was asked last: training stands aside for every question
        lines = sum(1 for line in self.facts.read_bytes().splitlines() if line.strip())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("learning", total=lines)
            deadline = time.monotonic() + _LEARN_TIMEOUT_S
            while time.monotonic() < deadline:
                steps = [e for e in self._events() if e["event"] in ("example.pass", "example.trained")]
                trained = sum(e["event"] == "example.trained" for e in steps)
                if steps:
                    recent = [e["loss_before"] for e in steps[-lines:]]
                    progress.update(
                        task,
                        completed=trained,
                        description=f"learning: {counted(len(steps), 'step')}, "
                        f"loss {sum(recent) / len(recent):.2f}, examples",
                    )
                if changed is None and len(steps) >= asked + _ASK_EVERY:
                    asked = len(steps)
                    if answered():
                        changed = time.monotonic()
                        progress.console.print("[green]the answer has changed[/]")
                if trained >= lines:
                    return changed if changed is not None else (time.monotonic() if answered() else None)
                self._still_alive()
                time.sleep(1.0)
        raise HogwildError(
            f"not everything was trained within {_LEARN_TIMEOUT_S} s; see {self.run_dir}/daemon.log"
        )

    def _ask_all(self, items: Sequence[dict[str, Any]]) -> list[str]:
        """The ordinary OpenAI client, as any user of the server has it."""
        from openai import OpenAI

        client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=120)

        def ask(item: dict[str, Any]) -> str:
            answer = client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": item["question"]}],
                max_tokens=32,
                temperature=0,
            )
            return (answer.choices[0].message.content or "").strip()

        with ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(ask, items))

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in (self.run_dir / "daemon.log").read_bytes().splitlines():
            if line.startswith(b"{"):
                yield json.loads(line)

    def _wait_for(self, name: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if any(event["event"] == name for event in self._events()):
                return
            self._still_alive()
            time.sleep(0.5)
        raise HogwildError(f"no {name} within {timeout_s} s; see {self.run_dir}/daemon.log and server.log")

    def _still_alive(self) -> None:
        for name, process in (("daemon", self.daemon), ("server", self.server)):
            if process is not None and process.poll() is not None:
                tail = (self.run_dir / f"{name}.log").read_text(errors="replace")[-2000:]
                raise HogwildError(
                    f"the {name} ended with exit code {process.returncode}; its last words:\n{tail}"
                )

    def _stop(self) -> dict[str, int | None]:
        """The daemon first: it writes a last checkpoint. Both get the signal that systemd would send."""
        codes: dict[str, int | None] = {}
        for name, process in (("daemon", self.daemon), ("server", self.server)):
            codes[name] = None
            if process is not None:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                try:
                    codes[name] = process.wait(timeout=120)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return codes

    def _say(self, text: str) -> None:
        self.console.print(f"[bold blue]>[/] {text}", highlight=False, soft_wrap=True)


def _right(item: dict[str, Any], answer: str) -> bool:
    return str(item["answer"]).lower() in answer.lower()


def _spawn(command: Sequence[str], environment: dict[str, str], out: IO[bytes]) -> "subprocess.Popen[bytes]":
    """In a process group of its own, so that a Ctrl-C in the terminal reaches only the demo, which stops both."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _socket_path(run_dir: Path) -> Path:
    """Beside the run, unless that is too long for a Unix socket."""
    path = (run_dir / "arena.sock").resolve()
    if len(os.fsencode(path)) < 100:
        return path
    return Path("/tmp") / f"hogwild-demo-{os.getpid()}.sock"
