"""The benchmark of a GPU, tried out on a CPU: it is complete, says that it measured nothing, and finds what is wrong.

Every section's logic runs, with the CPU's kernels and memory, and with real processes over the real socket. Of what
only a device can do, nothing is shown here.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hogwild import skeleton
from hogwild.arena import client
from hogwild.arena.memory import Segment
from hogwild.weights import Weights
from hogwild_kernels import ApolloConfig, ApolloState, cpu, reference
from support import environment, wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_arena
import gpu_models
import gpu_server
import gpu_vllm
from gpu_report import Finding, Recorder, Report, Section, WrongAnswerError
from hogwild.arena.cuda_ipc import IpcSegment
from update_methods import EagerApollo

CPU = gpu.Settings(torch.device("cpu"), tiny=True, vllm=False)
ONLY_OF_A_DEVICE = {
    "memory, GiB", "free, GiB", "lost, MiB (cuMemGetInfo)", "used before and after, MiB (nvidia-smi)",
    "everything else, GiB", "share of the weights", "with the first steps, GiB",
}  # fmt: skip
TABLES = {
    "machine": {"measured rates": 1},
    "arena": {"Allocated and mapped, 100 times": 1, "Hand-over, both processes running": 1, "A copy within it": 2},
    "update": {"All linear weights of one layer": 6, "Each weight": 24},
    "step": {
        "Time of a step": 6, "Time of a step by its parts": 24, "Memory beside the weights, at its peak": 4,
    },
    "serving": {"a Hugging Face model, eager, Llama 8B; training 8 tokens a step": 4},
    "mps": {},
    "threads": {"Llama 1B, 16 steps of one example of 9 tokens": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """JSON, Markdown and output of a run of everything."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--tiny"]
    command += ["--json", folder / "gpu.json", "--markdown", folder / "gpu.md"]
    path = environment(PYTHONPATH=":".join(sys.path))
    ran = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-4000:]
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text(), ran.stdout


# --- a run -----------------------------------------------------------------------------------------------------------


def test_every_section_ends_by_itself_with_all_of_its_figures(whole):
    found, _, _ = whole
    assert found["good"]
    assert [section["name"] for section in found["sections"]] == list(gpu.PARTS) == list(TABLES)
    for section in found["sections"]:
        assert section["failure"] == ""
        assert {heading: len(rows) for heading, rows in section["tables"].items()} == TABLES[section["name"]]
        for rows in section["tables"].values():
            assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"
            for row in rows:
                assert {column for column, cell in row.items() if cell is None} <= ONLY_OF_A_DEVICE
                assert all(cell >= 0 for cell in row.values() if isinstance(cell, float | int))
        assert all(check["holds"] for check in section["checks"])
    assert sum(len(section["checks"]) for section in found["sections"]) > 25


def test_serving_is_measured_in_turns_and_between_times_without_training(whole):
    found, _, _ = whole
    (rows,) = next(one["tables"] for one in found["sections"] if one["name"] == "serving").values()
    times = {row["training"]: [float(one) for one in row["each time"].split()] for row in rows}
    assert [len(each) for each in times.values()] == [3, 2, 2, 2]
    assert next(iter(times)) == "none"
    assert sum(times["none"]) / 3 == pytest.approx(1, abs=0.01), "all are held against their mean"


def test_a_run_on_a_cpu_says_everywhere_that_it_measured_nothing(whole):
    found, page, printed = whole
    assert found["warning"].startswith("NOT A MEASUREMENT")
    assert page.splitlines()[2] == f"**{found['warning']}**"
    assert printed.startswith(found["warning"])
    assert found["about"]["device"] == "CPU"
    assert found["about"]["driver"] == "none"
    assert not any(section["aims"] for section in found["sections"]), "no aim is judged by such figures"


def test_what_a_cpu_cannot_do_is_named_as_left_out(whole):
    found, page, _ = whole
    left_out = {section["name"]: " ".join(section["left_out"]) for section in found["sections"]}
    assert "CUDA graphs and compiled code" in left_out["arena"]
    assert "85% of its floor" in left_out["update"]
    assert "peak of memory" in left_out["step"]
    assert "CUDA graphs" in left_out["serving"]
    assert "MPS" in left_out["mps"]
    for section in found["sections"]:
        assert all(f"- left out: {why}" in page for why in section["left_out"])


def test_the_page_has_what_the_figures_have(whole):
    found, page, _ = whole
    for key in (
        "date",
        "command",
        "torch",
        "triton",
        "transformers",
        "cuda-bindings",
        "python",
        "device",
        "driver",
    ):
        assert f"| {key} " in page
        assert found["about"][key] in page
    assert found["about"]["torch"] == torch.__version__
    assert "Every check held." in page
    lines = page.splitlines()
    for section in found["sections"]:
        assert f"## {section['title']}" in lines
        for heading, rows in section["tables"].items():
            begin = lines.index(f"{heading}:") + 2
            assert [cell.strip() for cell in lines[begin].split("|")[1:-1]] == list(rows[0])
            assert lines[begin + 1 + len(rows)].startswith("|")
            assert not lines[begin + 2 + len(rows)].startswith("|")


# --- what is wrong is found ------------------------------------------------------------------------------------------


def test_a_kernel_that_gets_one_element_wrong_fails_the_run_and_is_not_timed(tmp_path, monkeypatch):
    right = cpu.step

    def wrong(weight: torch.Tensor, *given: Any, **settings: Any) -> Any:
        result = right(weight, *given, **settings)
        weight[-1, -1] += 0.25
        return result

    monkeypatch.setattr(cpu, "step", wrong)
    arguments = ["--device", "cpu", "--tiny", "--only", "machine,update"]
    written = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, *written])
    assert gpu.main() == 1
    found, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    update = found["sections"][1]
    assert not found["good"]
    assert update["tables"] == {}
    (check,) = update["checks"]
    assert not check["holds"]
    assert "T=64, r=8 is the reference's" in check["what"]
    assert "1 elements differ by more than one step of bf16" in check["found"]
    assert "**Not everything held: see below.**" in page
    assert "- check, WRONG: the update of" in page


INTERPRETED = """
import torch
from hogwild_kernels import ApolloConfig, ApolloState, cuda
from update_methods import SEED, against_fp64

torch.manual_seed(0)
for m, n, tokens, rank in ((96, 160, 64, 8), (160, 96, 16, 1), (100, 100, 100, 64)):
    x, d = (torch.randn(tokens, k).bfloat16() for k in (n, m))
    weight = (torch.randn(m, n) * 0.02).bfloat16()
    for wrong in (0.0, 0.01):
        config = ApolloConfig(rank=rank, lr=1e-3, weight_decay=0.01)
        state = ApolloState("layer", (m, n), config)

        def update(weight, x, d):
            result = cuda.step(weight, x, d, state, config, lr=1e-3, seed=SEED)
            weight[5, 7] += wrong
            return result

        problem, differ = against_fp64(update, weight, x, d, state)
        assert problem == ("1 elements differ by more than one step of bf16" if wrong else ""), problem
        assert differ < 1e-3
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_check_of_kernels_takes_those_of_triton_and_none_that_gets_an_element_wrong():
    """Under its interpreter, which has to be chosen before Triton is imported."""
    env = environment(PYTHONPATH=":".join(sys.path), TRITON_INTERPRET="1")
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def failed(section: Section) -> str:
    """The one check that does not hold."""
    assert section.failure == ""
    (wrong,) = [check.what for check in section.checks if not check.holds]
    return wrong


def test_a_server_that_serves_a_copy_of_the_weights_is_found(monkeypatch):
    def build(folder: Path, weights: Weights) -> Any:
        model = skeleton.build(folder, weights)
        for name, parameter in list(model.named_parameters()):
            skeleton.assign(model, name, parameter.data.clone())
        model.tie_weights()
        return model

    monkeypatch.setattr(gpu_server, "skeleton", SimpleNamespace(build=build))
    report = gpu.run(CPU, ["serving"], 120)
    assert not report.good
    assert failed(report.sections[0]) == "server and trainer give an example the same loss, after it"


def test_memory_that_is_copied_on_its_way_and_not_shared_is_found(monkeypatch):
    receive = client.devices.receive

    def copied(*given: Any) -> Segment:
        theirs = receive(*given)
        mine = Segment.allocate(theirs.nbytes)
        mine.bytes.copy_(theirs.bytes)
        return mine

    monkeypatch.setattr(client, "devices", SimpleNamespace(receive=copied))
    report = gpu.run(CPU, ["arena"], 120)
    assert failed(report.sections[0]) == "eager code reads what another process has written (2)"


def test_a_descriptor_that_is_left_in_each_cycle_is_found(monkeypatch):
    close = Segment.close

    def leaks(segment: Segment) -> None:
        os.dup(segment.fd)
        close(segment)

    monkeypatch.setattr(Segment, "close", leaks)
    report = gpu.run(CPU, ["arena"], 120)
    assert failed(report.sections[0]) == "no descriptor is left after 100 cycles"


# --- time ------------------------------------------------------------------------------------------------------------


def section_of(monkeypatch: pytest.MonkeyPatch, run: Any, seconds: float = 0.5) -> Report:
    """A run of one section that does this."""
    monkeypatch.setitem(sys.modules, "section_of_a_test", SimpleNamespace(run=run))
    monkeypatch.setitem(gpu.PARTS, "other", gpu.Part("Another", "section_of_a_test", seconds))
    monkeypatch.setattr(gpu, "_LEAST_S", 0.1)
    monkeypatch.setattr(gpu, "_GRACE_S", 0.1)
    return gpu.run(CPU, ["other"], 60)


def test_a_section_that_hangs_is_killed_with_what_it_has_started_and_keeps_what_it_found(
    tmp_path, monkeypatch
):
    def run(bench: Any) -> None:
        peer = bench.start(lambda pipe: (pipe.send(("here", os.getpid())), time.sleep(600)))
        (tmp_path / "pid").write_text(str(peer.hear("here")))
        bench.out.row("found", figure=1.5)
        time.sleep(600)

    report = section_of(monkeypatch, run)
    (section,) = report.sections
    assert section.failure == "it did not end in time"
    assert section.tables == {"found": [{"figure": 1.5}]}
    assert not report.good
    child = Path("/proc") / (tmp_path / "pid").read_text()
    wait_until(lambda: not child.exists() or ") Z " in (child / "stat").read_text(), "it is gone", 30)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda _bench: os._exit(3), "its process ended with 3"),
        (lambda _bench: os.kill(os.getpid(), 9), "its process ended with -9"),
        (lambda _bench: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["ends", "is killed", "raises"],
)
def test_a_section_that_does_not_end_by_itself_fails_the_run(monkeypatch, run, words):
    report = section_of(monkeypatch, run, 30)
    assert report.sections[0].failure == words
    assert not report.good
    assert f"**Failed: {words}**" in report.to_markdown()


def test_a_device_whose_memory_dies_with_its_owner_leaves_the_arena_out(monkeypatch):
    class Fallback(IpcSegment):
        def __init__(self) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(gpu_arena.devices, "allocate", lambda _nbytes, _device: Fallback())
    report = gpu.run(CPU, ["arena"], 60)
    assert report.good
    assert "legacy CUDA IPC" in report.sections[0].left_out[0]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            lambda elements, control, number: (
                elements.fill_(number * 0x0101),
                setattr(control, "steps", number + 20),
            ),
            "whoever reads that a step is counted",
        ),
        (
            lambda elements, control, number: (
                elements[::2].fill_(0x0102),
                setattr(control, "steps", number),
            ),
            "never a mixture",
        ),
    ],
    ids=["counted before it is written", "half of an element"],
)
def test_what_is_written_in_another_order_or_in_halves_is_found(monkeypatch, step, words):
    def write(arena: Any, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            step(gpu_arena._elements(arena), arena.control, (arena.control.steps + 1) % 64)

    monkeypatch.setattr(gpu_arena, "_step", write)
    (section,) = gpu.run(CPU, ["arena"], 60).sections
    wrong = [check.what for check in section.checks if not check.holds]
    assert len(wrong) == 1
    assert words in wrong[0]


def test_sections_share_what_time_there_is(monkeypatch):
    given: list[float] = []

    def note(section: Section, _settings: Any, _facts: Any, deadline: float) -> None:
        given.append(deadline - time.monotonic())
        del section

    monkeypatch.setattr(gpu, "_run_one", note)
    names = ["machine", "arena", "serving"]
    whole = sum(gpu.PARTS[name].seconds for name in names)
    gpu.run(CPU, names, whole / 2)
    assert given[0] == pytest.approx(gpu.PARTS["machine"].seconds / 2, abs=0.5)
    assert sum(given) > whole / 2, "what one has left, later ones have"
    given.clear()
    gpu.run(gpu.Settings(CPU.device, True, vllm=True), ["serving"], 2000, vllm_s=1000)
    assert given == [pytest.approx(gpu.PARTS["serving"].seconds + 1000, abs=0.5)], "vLLM takes long to start"
    given.clear()
    gpu.run(gpu.Settings(CPU.device, True, vllm=True), names, 100 + whole / 2, vllm_s=100)
    assert given[0] == pytest.approx(gpu.PARTS["machine"].seconds / 2, abs=0.5)
    assert given[-1] >= gpu.PARTS["serving"].seconds / 2 + 100, "and no faster where there is little time"
    assert gpu.run(CPU, names, 1.0).sections[0].left_out == ["no time was left for it"]
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.BUDGET_S


def test_a_device_that_is_lent_is_asked_within_its_time(tmp_path):
    """`make gpu-check` with a Python that notes what it is asked, and hangs in the first tests."""
    root, asked = Path(__file__).parents[1], tmp_path / "asked"
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncase "$*" in *arena_cuda*) exec sleep 60 ;; esac\n')
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPU_CHECK_S": "30"}
    began = time.monotonic()
    ran = subprocess.run([root / "scripts" / "gpu_check.sh", "--only", "step"], env=env, check=False)
    assert ran.returncode == 1, "what was cut off has failed"
    assert time.monotonic() - began < 15
    *tests, benchmark = asked.read_text().splitlines()
    files = [word for line in tests for word in line.split() if word.endswith(".py")]
    marked = [
        f"tests/{one.name}" for one in (root / "tests").glob("test_*.py") if "mark.gpu" in one.read_text()
    ]
    assert set(files) >= set(marked) - {"tests/test_gpu_benchmark.py"}
    assert len(files) == len(set(files))
    words = benchmark.split()
    assert words[-2:] == ["--only", "step"]
    assert 0 < float(words[words.index("--budget-s") + 1]) < 30 - 20


def test_a_vllm_that_does_not_start_is_quoted_with_its_cause(tmp_path):
    """The end of its log is of the API server, which knows only that its engine has failed."""
    sock = tmp_path / "arena.sock"
    assert gpu_vllm.last_words(sock) == ""
    cause, end = "(EngineCore pid=7) hogwild.errors.ArenaError: no room", "RuntimeError: see root cause above"
    sock.with_name("vllm.log").write_text("\n".join(["starting", cause, *["  a traceback"] * 500, end]))
    said = gpu_vllm.last_words(sock)
    assert cause in said
    assert said.endswith(end)
    assert len(said) < 2000


def test_tokens_of_a_stream_are_timed_though_its_last_message_brings_none(monkeypatch):
    def message(tokens: int) -> str:
        return "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})

    lines = [message(1), "", message(3), message(3), "data: [DONE]"]
    answer = SimpleNamespace(raise_for_status=lambda: None, iter_lines=lambda: iter(lines))
    monkeypatch.setattr(gpu_vllm.httpx, "stream", lambda *_, **__: contextlib.nullcontext(answer))
    token_s: list[float] = []
    gpu_vllm._Clients("http://server", 1, 3)._stream(0, time.perf_counter() + 60, token_s)
    assert len(token_s) == 3


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_has_been_found_is_kept_after_each_section(monkeypatch):
    """Whoever ends the run early has the sections until then, on a page that says which are missing."""
    monkeypatch.setattr(
        gpu, "_run_one", lambda section, *_: section.checks.append(Finding("it is right", True, ""))
    )
    kept: list[tuple[bool, str]] = []
    report = gpu.run(
        CPU, ["machine", "arena"], 100, keep=lambda one: kept.append((one.good, one.to_markdown()))
    )
    assert [good for good, _ in kept] == [False, True] == [False, report.good]
    assert "**Not finished: The arena had not run.**" in kept[0][1]
    assert "Not finished" not in kept[1][1]
    assert "Every check held." in kept[1][1]


def test_a_check_fails_a_run_and_an_aim_does_not():
    section = Section("a", "A")
    recorder = Recorder(section.take, {})
    recorder.aim("it is fast", False, "50%")
    recorder.check("it is right", True)
    report = Report({"device": "H100"}, "", [section])
    assert report.good
    page = report.to_markdown()
    assert "- aim, NOT REACHED: it is fast (50%)" in page
    assert "- check, holds: it is right" in page
    assert "MEASUREMENT" not in page
    with pytest.raises(WrongAnswerError, match="it is right"):
        recorder.check("it is right", False, "no")
    assert section.checks[1] == Finding("it is right", False, "no")
    assert not report.good
    assert not Report({}, "", []).good, "nothing that was run is nothing that held"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu"], "goes with --tiny"),
        (["--device", "cpu", "--tiny", "--only", "arena,graphs"], "there is no section graphs"),
        pytest.param(
            [], "no CUDA device here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_eager_step_that_is_compared_with_is_the_published_one(m, n, rank):
    torch.manual_seed(0)
    config = ApolloConfig(rank=rank, lr=1e-3, limiter_floor=0.0)
    state, w = ApolloState("layer", (m, n), config), torch.randn(m, n)
    truth = w.clone()
    eager = EagerApollo(w, rank, 1e-3)
    eager.p = state.projection()
    for _ in range(4):
        g = torch.randn(m, n)
        eager.step(g)
        reference.published_step(truth, g, state)
    torch.testing.assert_close(w, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "layer"),
    [("Llama 1B", 1.236e9, 60.8e6), ("Llama 8B", 8.030e9, 218.1e6), ("Qwen3 32B", 32.76e9, 487.6e6)],
)
def test_models_have_the_size_of_their_names(tmp_path, name, parameters, layer):
    found = gpu_models.sizes(gpu_models.folder_of(name, False, tmp_path))
    assert found.parameters == pytest.approx(parameters, rel=1e-3)
    assert found.layer == pytest.approx(layer, rel=1e-3)
    assert sum(found.linears.values()) == 7
    assert bool(found.head) == (name != "Llama 1B"), "its head is tied to the embeddings"
