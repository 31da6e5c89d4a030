"""Which room may know which: read from the source of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import environment

REPOSITORY = Path(__file__).resolve().parents[1]
DAEMON, KERNELS = REPOSITORY / "daemon" / "hogwild", REPOSITORY / "kernels" / "hogwild_kernels"
FILES = sorted([*DAEMON.rglob("*.py"), *KERNELS.rglob("*.py")])
HEAVY = {"torch", "transformers", "vllm", "numba", "triton", "accelerate", "safetensors"}


def module_name(file: Path) -> str:
    root = DAEMON.parent if file.is_relative_to(DAEMON) else KERNELS.parent
    parts = list(file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, *, late: bool = True) -> Iterator[str]:
    """Every module that a file imports, as an absolute dotted name; `late`: also inside functions."""
    tree = ast.parse(file.read_text())
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not late and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(file: Path, *names: str, late: bool = True) -> set[str]:
    """Those of a file's imports that are one of `names` or lie below it."""
    return {
        found
        for found in imports(file, late=late)
        if any(found == name or found.startswith(f"{name}.") for name in names)
    }


def offenders(files: list[Path], *names: str) -> dict[str, set[str]]:
    return {module_name(file): found for file in files if (found := imports_of(file, *names))}


def test_the_reader_of_imports_sees_them():
    """The other tests prove nothing unless this one holds."""
    assert imports_of(DAEMON / "vllm_plugin" / "loader.py", "vllm")
    assert imports_of(DAEMON / "vllm_plugin" / "__init__.py", "vllm"), "late imports count"
    assert imports_of(DAEMON / "supervisor.py", "hogwild.arena") >= {"hogwild.arena.hub.Hub"}
    assert imports_of(DAEMON / "attachment.py", "hogwild.served") == {"hogwild.served"}
    assert imports_of(KERNELS / "cpu.py", "hogwild_kernels.plan") == {"hogwild_kernels.plan"}
    assert len(FILES) > 40


def test_only_the_plugin_imports_vllm():
    others = [file for file in FILES if (DAEMON / "vllm_plugin") not in file.parents]
    assert not offenders(others, "vllm")


def test_the_daemon_does_not_import_what_imports_vllm():
    """The loader, and what replaces parts of vLLM, would drag it in."""
    others = [file for file in FILES if (DAEMON / "vllm_plugin") not in file.parents]
    reaching = {
        name
        for name in ("hogwild.vllm_plugin.loader", "hogwild.vllm_plugin.plain")
        if offenders(others, name)
    }
    assert not reaching


def test_no_model_of_transformers_is_built_inside_vllm():
    """vLLM's Transformers backend decorates the classes of transformers for its whole process."""
    inside = [file for file in FILES if (DAEMON / "vllm_plugin") in file.parents]
    builders = ("transformers", "hogwild.skeleton", "hogwild.naming", "hogwild.coverage", "hogwild.learner")
    found = offenders(inside, *builders)
    assert found.pop("hogwild.vllm_plugin.no_torchvision") <= {"transformers", "transformers.utils"}
    assert not found


def test_the_kernels_import_nothing_from_the_daemon():
    assert not offenders([file for file in FILES if file.is_relative_to(KERNELS)], "hogwild")


def test_stages_do_not_know_the_supervisor():
    above = {"supervisor.py", "cli.py"}
    stages = [file for file in FILES if file.name not in above]
    assert not offenders(stages, "hogwild.supervisor")
    assert set(offenders(FILES, "hogwild.cli")) == {"hogwild.__main__"}


@pytest.mark.parametrize("name", ["config", "log", "log_json", "errors", "state_lock", "cli", "__main__"])
def test_light_modules_import_nothing_heavy(name):
    assert not imports_of(DAEMON / f"{name}.py", *HEAVY, late=name not in ("cli", "__main__"))


@pytest.mark.parametrize("name", ["config", "log", "errors", "cli", "state_lock", "ledger", "spool"])
def test_importing_a_light_module_loads_nothing_heavy(name):
    """Also not by way of another module: `hogwild --help` answers at once."""
    script = f"import sys, hogwild.{name}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert not ran.stdout.split()


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['hogwild', '--help']\n"
        "from hogwild.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        f"print('heavy:', *sorted(set(sys.modules) & {HEAVY!r}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert "Usage" in ran.stdout
    assert ran.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("root", ["daemon", "kernels"])
def test_a_source_root_is_no_package(root):
    """`daemon` and `kernels` are import names of others: transformers looks for a package called `kernels`."""
    assert (REPOSITORY / root).is_dir()
    assert not list((REPOSITORY / root).glob("*.py"))


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for file in FILES}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
