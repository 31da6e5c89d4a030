"""What hogwild replaces inside vLLM: each piece small, with its place upstream, its reason, and when it can go.

    plain.py          linear layers and heads multiply with the weight as it lies
    convolution.py    Gated DeltaNet's convolution reads the weight as it lies
    experts.py        so do the experts of a mixture
    no_torchvision.py models whose text part needs no torchvision load without it

A replacement of something that no longer looks as it did would fail silently, in what is served. So each one is checked
before a model is built, and `hogwild doctor` lists them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KNOWN = "0.32"
"""Of vLLM: the version that the pieces below were written for. Others are accepted where all of them look the same."""


@dataclass(frozen=True)
class Patch:
    """One replacement.

    Attributes:
        name: for people.
        replaces: file and name upstream.
        why: what would happen without it.
        until: when it can go.
        differs: says what about the replaced piece is not as expected; "" if it is.
        install: puts it in place; may be called any number of times.
    """

    name: str
    replaces: str
    why: str
    until: str
    differs: Callable[[], str]
    install: Callable[[], None]


def looks_like(function: Any, parameters: list[str], *fragments: str) -> str:
    """What about a function is not as expected, or "": its parameters, and pieces of its source that matter."""
    found = list(inspect.signature(function).parameters)
    name = getattr(function, "__qualname__", repr(function))
    if found != parameters:
        return f"{name} takes {', '.join(found) or 'nothing'}; known is {', '.join(parameters)}"
    try:
        source = " ".join(inspect.getsource(function).split()) if fragments else ""
    except OSError:  # replaced by something that has none, by another plugin for example
        source = ""
    missing = [fragment for fragment in fragments if fragment not in source]
    return f"{name} no longer contains {missing[0]!r}" if missing else ""
