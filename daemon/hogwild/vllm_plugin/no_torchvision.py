"""Lets models be imported that name torchvision and need it for pictures alone, where there is no torchvision.

Qwen3.5 is the first: its text model lives in the file of its vision-language one. CPU builds of vLLM ask for a
torchvision that only exists for CUDA, and that then breaks transformers (scripts/setup.sh leaves it out).
"""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from hogwild.vllm_plugin.patch import Patch

_NAMES = (
    "torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional",
    "torchvision.transforms.v2", "torchvision.transforms.v2.functional",
)  # fmt: skip


class _Nothing(types.ModuleType):
    """Has every name, and nothing behind it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        place = f"{self.__name__}.{name}"

        def fail(*_: Any, **__: Any) -> Any:
            raise ImportError(
                f"{place} is needed for pictures, and torchvision is not installed: only text is served"
            )

        return type(name, (), {"__new__": fail})


def missing() -> bool:
    """Is there no torchvision?"""
    return "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None


def _install() -> None:
    if not missing():
        return
    from transformers import utils

    # These remember their answer: transformers goes on knowing that there is none, and keeps to its slower ways.
    assert not utils.is_torchvision_available()
    assert not utils.is_torchvision_v2_available()
    for name in _NAMES:
        module = _Nothing(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


PATCH = Patch(
    name="no torchvision",
    replaces="torchvision, where it is not installed, in the processes of vLLM",
    why="text models that share a file with vision-language ones (Qwen3.5) could not be imported",
    until="vllm/model_executor/models/qwen3_5.py imports image processors late, or a CPU torchvision can be installed",
    differs=lambda: "",
    install=_install,
)
