"""`/etc/hogwild/environment`, which the systemd units load beside the machine's configuration.

Whoever asks by hand what that configuration comes to (`hogwild config`, `doctor`, `status`) has none of it in their own
environment. Imports no torch.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

_LINE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)=(.*)")


def beside(config: Path | None, system: Path) -> Path | None:
    """The file, if `config` is the machine's and it is there; None: there is none that counts."""
    if config is None or config.absolute() != system:
        return None
    path = system.with_name("environment")
    return path if path.is_file() else None


def read(path: Path) -> Mapping[str, str]:
    """Its variables, as systemd takes them (systemd.exec(5), EnvironmentFile=).

    Raises:
        PermissionError: it may hold a key, and is root's.
    """
    found = {}
    text = path.read_text("utf-8", errors="replace").replace("\\\n", "")
    for line in text.splitlines():
        if (match := _LINE.fullmatch(line)) is not None:
            found[match[1]] = _value(match[2].strip())
    return found


def _value(text: str) -> str:
    """Without its quotes."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        return "".join(shlex.split(text))
    except ValueError:  # no closing one
        return text
