"""`hogwild train`: from files and a model folder to another model folder, in processes of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hogwild import one_shot, selfreplay, train_command
from hogwild.checkpoint import Checkpoints
from hogwild.config import load
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.one_shot import FileResult, OneShot, Result
from hogwild.settings import Config
from support import environment, wait_until
from tiny import llama, tokenizer

TEACH = [{"id": f"t{i}", "prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(6)]
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = llama(tmp_path_factory.mktemp("base") / "model", torch.bfloat16)
    tokenizer(folder)
    return folder


def write(path: Path, lines: list[dict[str, Any]], *more: str) -> Path:
    path.write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + "".join(f"{line}\n" for line in more)
    )
    return path


def train(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=env(settings), capture_output=True, text=True, check=False)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hogwild", "train", *map(str, arguments)]


def env(settings: dict[str, object]) -> dict[str, str]:
    names = {f"HOGWILD_{key.upper()}": str(value) for key, value in settings.items()}
    return {**environment(**names), "COLUMNS": "200", "NO_COLOR": "1"}


def test_it_learns_reports_and_writes_a_plain_model(model: Path, tmp_path: Path) -> None:
    """The whole story in one run: good lines train beside bad ones, the rest of the model stays as it was."""
    good, mixed = write(tmp_path / "a.jsonl", TEACH[:3]), write(tmp_path / "b.jsonl", TEACH[3:], '{"txt": 1}')
    same = write(tmp_path / "c.jsonl", TEACH[:3])
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = tmp_path / "deep" / "out"
    ran = train(
        good,
        mixed,
        same,
        "--model",
        model,
        "--out",
        out,
        "--passes",
        12,
        "--lr",
        3e-3,
        "--threads",
        1,
        "--json",
    )
    assert ran.returncode == 0, ran.stderr
    assert "err b.jsonl:4 txt: unknown field; did you mean `text`?" in ran.stderr
    assert "duplicate: the same as a.jsonl:1" in ran.stderr
    result = json.loads(ran.stdout)
    assert (result["out"], result["passes"], result["interrupted"]) == (str(out), 6 * 12, False)
    first, second, third = result["files"]
    assert [one["file"] for one in result["files"]] == [str(good), str(mixed), str(same)]
    assert (first["examples"], first["rejected"], first["failed"], first["measured"]) == (3, 0, 0, 3)
    assert (second["examples"], second["rejected"]) == (3, 1)
    assert third["same_as"] == str(good)
    for one in (first, second):
        assert one["loss_after"] < 0.7 * one["loss_before"]
    # What is written is a model like the one that was read, which is untouched.
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert {path.name for path in out.iterdir()} == set(before)
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside it"
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {
        n: (t.shape, t.dtype) for n, t in new.items()
    }
    still = {name for name in old if torch.equal(old[name], new[name])}
    assert still == {"model.embed_tokens.weight", *(name for name in old if old[name].ndim == 1)}
    # The losses that it reports are those of the folder that it wrote, as transformers loads it.
    for folder, key in ((model, "loss_before"), (out, "loss_after")):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        words = AutoTokenizer.from_pretrained(folder)
        losses = []
        for line in TEACH[:3]:
            context = words(line["prompt"])["input_ids"]
            ids = [*context, *words(line["completion"])["input_ids"], words.eos_token_id]
            labels = torch.tensor([[-100] * len(context) + ids[len(context) :]])
            with torch.no_grad():
                losses.append(float(loaded(torch.tensor([ids]), labels=labels).loss))
        assert sum(losses) / 3 == pytest.approx(first[key], abs=0.02)


def test_a_file_may_have_any_name(model: Path, tmp_path: Path) -> None:
    """As in the spool: bytes that are no UTF-8 are replaced where it is written down."""
    file = Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"\xff.jsonl"))
    write(file, TEACH[:1])
    for name in ("one", "two"):  # the second goes on in the state folder of the first, whose file this is
        told = ["--state", tmp_path / "state", "--out", tmp_path / name, "--passes", 1, "--json"]
        ran = train(file, "--model", model, *told)
        assert ran.returncode == 0, ran.stderr
        (found,) = json.loads(ran.stdout)["files"]
        assert (found["file"], found["examples"], found["same_as"]) == (str(file), 1, None)


def test_a_model_that_is_ruined_is_not_written(model: Path, tmp_path: Path) -> None:
    """A rate that no weight survives; with another one the same state folder begins again."""
    file, out = write(tmp_path / "a.jsonl", TEACH[:1]), tmp_path / "out"
    told = [file, "--model", model, "--state", tmp_path / "state", "--out", out, "--passes", 1, "--json"]
    ran = train(*told, "--lr", 1e38)
    assert ran.returncode == 1
    assert "a.jsonl: its loss is not a number any more" in ran.stderr
    assert "optimizer.lr than 1e+38" in ran.stderr
    assert not out.exists()
    ran = train(*told, "--lr", 1e-3)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["files"][0]["loss_after"] > 0


def test_strict_trains_nothing_beside_a_bad_line(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", TEACH, "{")
    ran = train(file, "--model", model, "--out", tmp_path / "out", "--strict")
    assert ran.returncode == 1
    assert "err a.jsonl:7 not JSON" in ran.stderr
    assert "--strict" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_usable_line_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Neither the model, which is not even one here, nor what would take seconds to import."""
    file = write(tmp_path / "a.jsonl", [], "[]", '{"txt": "a"}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    code = (
        "import atexit, sys; from hogwild.cli import main\n"
        "heavy = ('torch', 'transformers', 'numba')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "main()"
    )
    arguments = ["train", file, "--model", tmp_path / "model", "--out", tmp_path / "out"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env({}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "err a.jsonl:2 txt: unknown field; did you mean `text`?" in ran.stderr
    assert "hogwild: no line can be trained" in ran.stderr
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("problem", "code", "says"),
    [
        ("full", 2, "is there already"),
        ("no-model", 2, "no config.json there"),
        ("quantised", 2, "its weights are quantised"),
        ("no-file", 2, "cannot be read"),
        ("no-option", 2, "--out"),
        ("no-such-kind-of-device", 2, "--device gpu0: give cpu, cuda, or"),
        ("bad-rate", 78, "optimizer.lr"),
        ("nothing-good", 1, "no line can be trained"),
        ("too-long", 1, "no line can be trained"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, problem: str, code: int, says: str
) -> None:
    file = write(tmp_path / "a.jsonl", [] if problem == "nothing-good" else TEACH, "[]")
    out = tmp_path / "out"
    if problem == "full":
        out.mkdir()
        (out / "precious").write_text("")
    if problem == "quantised":
        model = shutil.copytree(model, tmp_path / "model")
        described = json.loads((model / "config.json").read_bytes())
        described["quantization_config"] = {"quant_method": "fp8"}
        (model / "config.json").write_text(json.dumps(described))
    there = sorted(tmp_path.rglob("*"))
    arguments = {
        "no-model": [file, "--model", tmp_path, "--out", out],
        "no-file": [tmp_path / "absent.jsonl", "--model", model, "--out", out],
        "no-option": [file, "--model", model],
        "no-such-kind-of-device": [file, "--model", model, "--out", out, "--device", "gpu0"],
        "bad-rate": [file, "--model", model, "--out", out, "--lr", -1],
    }.get(problem, [file, "--model", model, "--out", out])
    ran = train(*arguments, **({"training__max_tokens": 3} if problem == "too-long" else {}))
    assert ran.returncode == code, ran.stderr
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", TEACH)
    ran = train(file, "--model", model, "--out", tmp_path / "out", "--device", "cuda")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "of a GPU" in ran.stderr or "cannot allocate" in ran.stderr
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.gpu
def test_it_learns_on_a_gpu(model: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path / "a.jsonl", TEACH[:3]), tmp_path / "out"
    how = ["--passes", 12, "--lr", 3e-3, "--threads", 1, "--device", "cuda", "--json"]
    ran = train(file, "--model", model, "--out", out, *how)
    assert ran.returncode == 0, ran.stderr
    (one,) = json.loads(ran.stdout)["files"]
    assert one["loss_after"] < 0.7 * one["loss_before"]
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: t.shape for name, t in old.items()} == {name: t.shape for name, t in new.items()}


def test_ctrl_c_saves_what_was_learned_and_the_state_folder_goes_on(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", TEACH)
    state, out = tmp_path / "state", tmp_path / "out"
    arguments = [file, "--model", model, "--state", state, "--threads", 1, "--json"]
    settings: dict[str, object] = {"replay__ratio": 0}
    with subprocess.Popen(
        command(*arguments, "--out", out, "--passes", 10_000),
        env=env(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        wait_until(lambda: passes(state) > 20, "it trains")
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 0, stderr
    result = json.loads(stdout)
    assert result["interrupted"]
    assert result["passes"] == passes(state) > 20
    assert result["files"][0]["loss_after"] < result["files"][0]["loss_before"]
    first = load_file(out / "model.safetensors")
    with Ledger(state / "ledger.sqlite") as ledger, ledger._db.write(fsync=True) as db:
        db.execute("UPDATE examples SET passes = passes_done + 2")  # enough is enough
    ran = train(*arguments, "--out", tmp_path / "more", **settings)
    assert ran.returncode == 0, ran.stderr
    again = json.loads(ran.stdout)
    assert (again["interrupted"], again["passes"]) == (False, result["passes"] + 12)
    assert again["files"][0]["loss_before"] == result["files"][0]["loss_after"], "from where it stopped"
    second = load_file(tmp_path / "more" / "model.safetensors")
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"]
    )
    ran = train(*arguments, "--out", tmp_path / "none", **settings)
    assert ran.returncode == 0, ran.stderr
    third = load_file(tmp_path / "none" / "model.safetensors")
    assert all(torch.equal(third[name], tensor) for name, tensor in second.items()), (
        "what was learned, once more"
    )


def test_term_that_comes_twice_at_once_is_one_and_saves(model: Path, tmp_path: Path) -> None:
    """timeout(1) sends it to its child, and to the process group of the child."""
    file, state, out = write(tmp_path / "a.jsonl", TEACH), tmp_path / "state", tmp_path / "out"
    arguments = [file, "--model", model, "--out", out, "--state", state, "--threads", 1, "--passes", 10_000]
    with subprocess.Popen(
        command(*arguments), env=env({"replay__ratio": 0}), stderr=subprocess.PIPE, text=True
    ) as running:
        wait_until(lambda: passes(state) > 20, "it trains")
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        while "once more to give up" not in running.stderr.readline():
            pass  # so that the kernel does not make one of the two
        running.send_signal(signal.SIGTERM)
        _, stderr = running.communicate(timeout=120)
    assert running.returncode == 0, stderr
    assert (out / "model.safetensors").exists()


def test_a_run_that_is_given_up_while_it_prepares_does_not_wait_for_that(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = threading.Event(), threading.Event()

    def make(*_given: Any, stopped: Callable[[], bool], **_named: Any) -> list[Any]:
        began.set()
        wait_until(stopped, "it is told to stop", 60)
        ended.set()
        return []

    def told(*_given: Any) -> float:
        assert began.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(selfreplay, "make", make)
    monkeypatch.setattr(Learner, "loss", told)  # of the examples as they are before anything is trained
    with pytest.raises(KeyboardInterrupt):
        one_shot.OneShot(Config(), model, tmp_path / "out").run([write(tmp_path / "a.jsonl", TEACH)])
    assert ended.is_set(), "Python waits for such a thread, however the process ends"


def test_a_model_that_somebody_gives_up_while_it_is_written_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "state", 1)
    shutil.copytree(model, checkpoints.root / "generation-00000001")
    checkpoints.point_current_at(1)
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()

    def told(_path: Path) -> None:
        assert list(out.parent.iterdir()), "otherwise there is nothing to leave"
        raise KeyboardInterrupt

    monkeypatch.setattr(one_shot, "_fsync", told)
    with pytest.raises(KeyboardInterrupt):
        one_shot.OneShot(Config(), model, out)._publish(checkpoints)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    "where", [(Learner, "save"), (Ledger, "complete_checkpoint")], ids=["before", "after"]
)
@pytest.mark.parametrize("saved", [False, True], ids=["the first", "a later one"])
def test_a_run_that_ends_between_its_last_pass_and_the_checkpoint_is_gone_on_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool, where: tuple[type, str]
) -> None:
    """A kill, or a full disk: before the checkpoint is there, or before the ledger knows of it."""
    first, second = write(tmp_path / "a.jsonl", TEACH[:1]), write(tmp_path / "b.jsonl", TEACH[1:2])
    config = load(overrides={"training.threads": 1, "training.passes": 1, "replay.self_texts": 0})

    def run(out: str) -> Result:
        return OneShot(config, model, tmp_path / out, tmp_path / "state").run([first, second][: 1 + saved])

    if saved:
        OneShot(config, model, tmp_path / "before", tmp_path / "state").run([first])
    with monkeypatch.context() as full:
        full.setattr(*where, lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            run("lost")
    result = run("out")
    assert result.steps >= 1 + saved
    assert not torch.equal(weights(tmp_path / "out"), weights(model))
    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        assert ledger.counts().durable == 1 + saved


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([one.flatten() for one in load_file(folder / "model.safetensors").values()])


def test_an_out_that_could_not_be_written_is_written_by_the_same_command_again(
    model: Path, tmp_path: Path
) -> None:
    """Also: step_tokens counts as in the daemon, and another spelling of a file's name is the same file."""
    file, state, out = write(tmp_path / "a.jsonl", TEACH), tmp_path / "state", tmp_path / "out"
    arguments = [
        file,
        "--model",
        model,
        "--out",
        out,
        "--state",
        state,
        "--passes",
        2,
        "--threads",
        1,
        "--json",
    ]
    settings: dict[str, object] = {"replay__ratio": 0, "training__step_tokens": 1000}
    with subprocess.Popen(
        command(*arguments), env=env(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        wait_until(lambda: (state / "ledger.sqlite").exists(), "it has begun")
        out.mkdir()
        (out / "somebody's").touch()  # as another program might, meanwhile
        _, stderr = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "could not be written" in stderr
    assert "the same command tries again" in stderr
    (out / "somebody's").unlink()
    arguments[0] = f"{file.parent}/../{file.parent.name}/{file.name}"
    ran = train(*arguments, **settings)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert (said["passes"], said["steps"]) == (2 * len(TEACH), 2), "all lines in one step"
    assert said["files"][0]["same_as"] is None
    assert (out / "model.safetensors").exists()


def passes(state: Path) -> int:
    path = state / "ledger.sqlite"
    if not path.exists():
        return 0
    try:
        with Ledger(path, readonly=True) as ledger:
            return ledger.counts().passes
    except Exception:
        time.sleep(0.1)  # it is being made
        return 0


@pytest.mark.parametrize("columns", [None, "60"])
def test_the_report_names_each_file_in_full(capsys, monkeypatch, columns):
    """In a pipe on one line; where there is no room for that, on several."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    path = f"/home/{'x' * 80}/facts.jsonl"
    files = [FileResult(path, 3, 1, 0, 3, 1.25, 0.5), FileResult("b.jsonl", 3, 0, same_as=path)]
    files.append(FileResult("[en].jsonl", 1, 0))
    train_command._report(Result("/out[/a]", files, 9, 9, 3.0, interrupted=False))
    said = capsys.readouterr().out
    assert said.count("x") == 161  # and one in the heading
    assert columns or f"b.jsonl (the same as {path})" in said
    assert "[en].jsonl" in said
    assert "/out[/a]" in said
