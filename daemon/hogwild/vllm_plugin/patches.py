"""The replacements that are in force in a vLLM process, checked and listed: see patch.py."""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import asdict

import vllm
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

from hogwild.errors import VerificationError
from hogwild.vllm_plugin.patch import KNOWN, Patch


def _of(module: str) -> Patch:
    """The replacement that a module makes; where vLLM has no such thing, one that says so."""
    try:
        patch: Patch = importlib.import_module(f"hogwild.vllm_plugin.{module}").PATCH
    except (ImportError, AttributeError) as error:
        why = f"what it replaces is not there: {error}"
        return Patch(module, f"see {module}.py", why, KNOWN, lambda: why, lambda: None)
    return patch


CPU = tuple(_of(module) for module in ("plain", "convolution", "experts"))
ANYWHERE = (_of("no_torchvision"),)


def wanted() -> tuple[Patch, ...]:
    """Those that this machine needs."""
    return (*ANYWHERE, *(CPU if current_platform.is_cpu() else ()))


def check() -> None:
    """See that everything that will be replaced looks as it did.

    Raises:
        VerificationError: naming every piece that does not; silently dead weights would be the result.
    """
    problems = [f"{patch.replaces}: {why}" for patch in wanted() if (why := patch.differs())]
    if problems:
        raise VerificationError(
            f"vLLM {vllm.__version__} has changed where hogwild replaces parts of it: use vLLM {KNOWN}",
            problems,
        )


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Put them in place. Linear layers and heads that are loaded after it closes (a draft model's) are packed again.

    Raises:
        VerificationError: see `check`.
    """
    check()
    packs = utils.dispatch_cpu_unquantized_gemm
    for patch in wanted():
        patch.install()
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packs


def report() -> list[dict[str, str]]:
    """Of each: its texts, and `differs`."""
    return [
        {k: v for k, v in asdict(patch).items() if isinstance(v, str)} | {"differs": patch.differs()}
        for patch in wanted()
    ]
