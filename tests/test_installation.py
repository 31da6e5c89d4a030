"""`hogwild install` and `uninstall` in a folder; the live ones are in test_systemd.py."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hogwild import config as configuration
from hogwild import installation
from hogwild.errors import UsageError
from support import environment, free_port

WRITTEN = (
    "etc/systemd/system/hogwild.service",
    "etc/systemd/system/hogwild-vllm.service",
    "etc/systemd/system/hogwild.target",
    "etc/sysusers.d/hogwild.conf",
    "etc/tmpfiles.d/hogwild.conf",
)


def hogwild(*arguments: object, check: bool = True) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "hogwild", *map(str, arguments)],
        env=environment(COLUMNS="200"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not check or ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_a_dry_run_writes_nothing_and_says_everything(tmp_path: Path) -> None:
    said = hogwild("install", "--root", tmp_path, "--dry-run")
    for name in (*WRITTEN, installation.CONFIG):
        assert f"would write  {tmp_path}/{name}" in said
    assert "would run    systemd-sysusers" in said
    assert list(tmp_path.iterdir()) == []


def test_install_twice_then_uninstall(tmp_path: Path) -> None:
    program = Path("/srv/hogwild/bin/hogwild")
    hogwild(
        "install", "--root", tmp_path, "--program", program, "--preset", "gpu-24gb", "--model", "/srv/model"
    )
    written = files(tmp_path)
    for name in WRITTEN[:2]:
        assert f"ExecStart={program} " in written[name]
        assert installation.PROGRAM not in written[name]
    config = tmp_path / installation.CONFIG
    settings = configuration.load(config)
    assert (settings.model, settings.training.threads) == ("/srv/model", 1)
    assert settings.state_dir == Path("/var/lib/hogwild")
    assert (tmp_path / installation.LINK).readlink() == program

    config.write_text("[training]\nthreads = 9\n")
    (tmp_path / WRITTEN[0]).write_text("an older one\n")
    said = hogwild("install", "--root", tmp_path, "--program", program)
    assert f"updated      {tmp_path}/{WRITTEN[0]}" in said
    assert configuration.load(config).training.threads == 9, "the configuration is the operator's"
    assert files(tmp_path)[WRITTEN[0]] == written[WRITTEN[0]]

    data = tmp_path / "var/lib/hogwild/ledger.sqlite"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("precious")
    hogwild("uninstall", "--root", tmp_path, "--dry-run")
    assert (tmp_path / WRITTEN[0]).exists()
    hogwild("uninstall", "--root", tmp_path)
    left = files(tmp_path)
    assert [name for name in WRITTEN if name in left] == []
    assert not (tmp_path / installation.LINK).is_symlink()
    assert left[installation.CONFIG]
    assert left["var/lib/hogwild/ledger.sqlite"] == "precious"
    assert hogwild("uninstall", "--root", tmp_path), "twice is no error"


@pytest.mark.parametrize("asked", [["--model", "/srv/other"], ["--preset", "gpu-24gb"]], ids=" ".join)
def test_who_asks_for_settings_that_are_not_written_is_told(tmp_path: Path, asked: list[str]) -> None:
    assert "note: --model" not in hogwild("install", "--root", tmp_path, *asked)
    before = (tmp_path / installation.CONFIG).read_text()
    said = hogwild("install", "--root", tmp_path, *asked)
    assert "note: --model and --preset begin a configuration: what this one says stays" in said
    assert (tmp_path / installation.CONFIG).read_text() == before


def test_somebody_elses_link_is_left_alone(tmp_path: Path) -> None:
    link = tmp_path / installation.LINK
    link.parent.mkdir(parents=True)
    link.symlink_to("/elsewhere/hogwild")
    hogwild("install", "--root", tmp_path, "--program", "/srv/hogwild")
    hogwild("uninstall", "--root", tmp_path)
    assert link.readlink() == Path("/elsewhere/hogwild")


def test_without_a_preset_the_server_listens_on_this_machine_alone(tmp_path: Path) -> None:
    hogwild("install", "--root", tmp_path)
    assert configuration.load(tmp_path / installation.CONFIG).server.arguments[:2] == ("--host", "127.0.0.1")


@pytest.mark.parametrize("arguments", [["--preset", "gpu"], ["--unheard-of"]], ids=" ".join)
def test_a_wrong_option_writes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    said = hogwild("install", "--root", tmp_path, *arguments, check=False)
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_units_call_the_program_by_a_path_that_systemd_takes(tmp_path: Path) -> None:
    hogwild("install", "--root", tmp_path, "--program", "bin/hogwild")
    program = installation.called(tmp_path / "etc/systemd/system/hogwild.service")
    assert program == Path.cwd() / "bin/hogwild"
    for wrong in ("/opt/my apps/bin/hogwild", "/opt/50%/bin/hogwild"):
        said = hogwild("install", "--root", tmp_path / "other", "--program", wrong, check=False)
        assert f"--program {wrong}: units cannot call a path with" in said
        assert not (tmp_path / "other").exists()


def test_a_program_that_the_service_cannot_reach_is_refused(tmp_path: Path) -> None:
    shut = tmp_path / "shut"
    (shut / "bin").mkdir(parents=True)
    shut.chmod(0o700)
    assert str(shut) in installation.hidden(shut / "bin" / "hogwild") or "/tmp" in installation.hidden(
        shut / "bin"
    )
    assert installation.HIDDEN
    for folder in installation.HIDDEN:
        assert f"the units hide {folder} from the service" in installation.hidden(
            Path(folder, "venv/bin/hogwild")
        )
    assert installation.hidden(Path("/usr/bin/python3")) == ""
    if os.geteuid() != 0:
        with pytest.raises(UsageError, match="run it as root"):
            installation.Installation(None, Path("/usr/bin/env"), dry_run=False, say=print).uninstall()


def test_the_wheel_has_units_and_configuration_and_works_without_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    """In a clean environment that sees the heavy packages of this one, but not this checkout."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "heavy.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python, program = folder / "bin" / "python", folder / "bin" / "hogwild"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "-I", "--root-user-action=ignore", wheel],
        check=True,
    )  # fmt: skip
    here = environment(
        COLUMNS="200",
        HOGWILD_STATE_DIR=f"{tmp_path}/state",
        HOGWILD_SERVER__URL=f"http://127.0.0.1:{free_port()}",
    )
    plain = {key: value for key, value in here.items() if not key.startswith("PYTHON")}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(arguments, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)

    where = run(
        str(python),
        "-c",
        "import hogwild, hogwild_kernels; print(hogwild.__file__, hogwild_kernels.__file__)",
    )
    assert where.stdout.count(str(folder)) == 2, where.stdout + where.stderr
    dry = run(str(program), "install", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would write  /etc/systemd/system/hogwild-vllm.service" in dry.stdout
    assert run(str(program), "config", "--preset", "gpu-80gb").stdout.startswith("# hogwild: every key")
    examined = run(str(program), "doctor")
    assert "plugin: vLLM loads it" in examined.stdout, examined.stdout + examined.stderr
    assert examined.returncode == 0, examined.stdout
    assert run(str(program), "demo", "--help").returncode == 0
    run(
        str(python), "-c", "from hogwild.resources import resource; resource('demo/facts.jsonl').read_bytes()"
    )
