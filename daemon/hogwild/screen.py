"""The status on one screen. Imports no torch."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hogwild.plural import counted
from hogwild.terminal import plain

_MIB = 1024 * 1024
_OLD_S = 30.0  # it is written every few seconds
_NAME_COLUMNS = 11  # of a file's name, at least


def screen(status: dict[str, Any]) -> RenderableType:
    """What is being learned, how fast, what waits, the probes, the last checkpoint, and what is wrong."""
    if "learning" not in status:
        return _waiting(status)
    parts: list[RenderableType] = [
        _facts(status),
        Text(),
        _Files(status["learning"]["files"]),
        *_warnings(status),
    ]
    return Panel(Group(*parts), title=_title(status), title_align="left", padding=(1, 2))


def _waiting(status: dict[str, Any]) -> RenderableType:
    """No server has brought its weights yet."""
    parts: list[RenderableType] = [Text(status.get("waiting", "it is just starting"), style="yellow")]
    if "pending" not in status:  # a daemon that has just started has not counted yet
        parts += [Text(f"{key:>14}  {value}") for key, value in status.items()]
    else:
        waits = counted(status["pending"], "example waits", "examples wait")
        parts.append(Text(f"{waits}, {_bad(status)}{_in_spool(status)}"))
        parts += _warnings(status)
    title = f"hogwild, process {status['pid']}{_as_of(status)}"
    return Panel(Group(*parts), title=title, title_align="left", padding=(1, 2))


def _warnings(status: dict[str, Any]) -> list[RenderableType]:
    found = [Text(f"! {plain(warning)}", style="bold yellow") for warning in status["warnings"]]
    return [Text(), *found] if found else []


def _in_spool(status: dict[str, Any]) -> str:
    spool = status["spool"]
    return (
        f"; {counted(spool['files'], 'file')} in incoming/, the oldest {_span(spool['oldest_s'])}"
        if spool["files"]
        else ""
    )


def _bad(status: dict[str, Any]) -> str:
    return counted(status["failed"] + status["rejected"], "bad line")


def _title(status: dict[str, Any]) -> Text:
    state = (
        Text("training", style="bold green") if status["training"] else Text("not training", style="bold red")
    )
    if status["training"] and not status["learning"]["passes_left"]:
        state = Text("idle, all is learned", style="bold green")
    said = f"  up {_span(status['uptime_s'])}, process {status['pid']}{_as_of(status)}"
    return Text.assemble("hogwild  ", state, said)


def _as_of(status: dict[str, Any]) -> str:
    """Of a daemon that is at something long, or cannot write (a full disk), what it said last is shown."""
    age = time.time() - status.get("at", math.inf)
    return f", as of {_span(age)} ago" if age > _OLD_S else ""


def _facts(status: dict[str, Any]) -> Table:
    learning, serving, checkpoint = status["learning"], status["serving"], status["checkpoint"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_row("model", Text(f"{status['model']}, step {status['step']}, epoch {status['epoch']}"))
    speed = f"{learning['tokens_per_s']} trained tokens/s, {learning['updates_per_s']} updates/s"
    loss = "" if learning["loss"] is None else f", loss {learning['loss']:.2f} nats/token lately"
    table.add_row("speed", Text(speed + loss))
    eta = "" if learning["eta_s"] is None else f", about {_span(learning['eta_s'])}"
    queue = f"{counted(status['pending'], 'example')}, {counted(learning['passes_left'], 'pass', 'passes')} at most"
    table.add_row("queue", Text(f"{queue}{eta}{_in_spool(status)}"))
    table.add_row(
        "learned",
        Text(
            f"{status['trained']} trained, {status['durable']} durable, {status['quarantined']} in quarantine, "
            f"{status['undone']} undone, {_bad(status)}"
        ),
    )
    table.add_row("probes", _probes(status))
    saved = checkpoint["saved_at"]
    what = f"generation {checkpoint['generation']}, {_span(checkpoint['age_s'])} ago" if saved else "none yet"
    table.add_row(
        "checkpoint", Text(f"{what}, {counted(status['step'] - status['saved_step'], 'step')} since")
    )
    server = status["server"].get("url") or "none attached"
    latency = serving["token_latency_s"]
    pace = f", {latency * 1000:.0f} ms between tokens" if latency else ""
    table.add_row(
        "server", Text(f"{server}: {serving['running']} running, {serving['waiting']} waiting{pace}")
    )
    memory, trips = status["memory"], status["guards"]["trips"]
    said = ", ".join(f"{guard} {count}" for guard, count in sorted(trips.items())) or "never"
    table.add_row("guards", Text(f"tripped: {said}", style="yellow" if trips else ""))
    table.add_row(
        "memory",
        Text(
            f"{memory['private_bytes'] / _MIB:.0f} MiB private, {memory['resident_bytes'] / _MIB:.0f} MiB resident"
        ),
    )
    return table


def _probes(status: dict[str, Any]) -> Text:
    newest, good, margin = (status["probes"][key] for key in ("newest", "good", "margin"))
    if newest is None:
        return Text(
            "not scored yet" if good is None else f"not scored yet; good: generation {good['generation']}"
        )
    text = Text()
    for name, loss in newest["losses"].items():
        was = good["losses"].get(name) if good else None
        risen = 0.0 if was is None or loss is None else loss - was
        style = "green" if risen < margin / 2 else "yellow" if risen <= margin else "bold red"
        shown = "not a number" if loss is None else f"{loss:.3f}"
        text.append(f"{name} {shown}", style=style)
        if was is not None:
            text.append(
                f" ({round(risen, 3) + 0.0:+.3f} since generation {good['generation']}, {margin} allowed)"
            )
        if name in newest["right"]:
            text.append(f", {newest['right'][name]:.0%} of tokens right")
        text.append("  ")
    return text


@dataclass(frozen=True)
class _Files:
    """One row a file. Where there is no room for every column, the time goes, and what there is none of; not digits."""

    files: Sequence[dict[str, Any]]

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        counts = ("examples", "pending", "trained", "durable", "quarantined", "undone")
        columns = {
            "file": [plain(file["name"]) for file in self.files],
            **{heading: [str(file[heading]) for file in self.files] for heading in counts},
            "bad": [str(file["failed"] + file["rejected"]) for file in self.files],
            "accepted": [(file["accepted_at"] or "")[:16].replace("T", " ") for file in self.files],
        }
        for heading in ("accepted", *(name for name, cells in columns.items() if set(cells) == {"0"})):
            others = (max(map(len, (name, *cells))) for name, cells in columns.items() if name != "file")
            if sum(2 + width for width in others) + _NAME_COLUMNS > options.max_width:
                del columns[heading]
        table = Table(box=None, pad_edge=False, header_style="cyan")
        for heading in columns:
            is_text = heading in ("file", "accepted")
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "file")
        for name, *rest in zip(*columns.values(), strict=True):
            table.add_row(Text(name, no_wrap=True, overflow="ellipsis"), *map(Text, rest))
        yield table


def _span(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
