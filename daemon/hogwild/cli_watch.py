"""Commands that look: status, report, quarantine."""

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hogwild import commands, owner, running, state_lock
from hogwild import config as configuration
from hogwild.cli_history import ConfigOption, JsonOption
from hogwild.errors import HogwildError
from hogwild.plural import counted

if TYPE_CHECKING:
    from hogwild.ledger import Suspect
    from hogwild.settings import Config

_REFRESH_S = 1.0


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (status, report, quarantine):
        app.command()(command)


def status(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it, until Ctrl-C.")] = False,
) -> None:
    """Say what the daemon is doing: what is learned, how fast, what waits, probes, checkpoint, warnings."""
    settings = configuration.load(config)
    owner.become(settings.state_dir)
    from rich.live import Live

    from hogwild import terminal
    from hogwild.screen import screen

    console = terminal.console(terminal.SCREEN)

    def show() -> None:
        if as_json:
            typer.echo(json.dumps(_status(settings)))
        else:
            console.print(screen(_status(settings)))
        sys.stdout.flush()  # whoever reads a pipe wants it now

    if not watch:
        show()
        return
    with contextlib.suppress(KeyboardInterrupt):
        if as_json or not console.is_terminal:
            while True:
                show()
                time.sleep(_REFRESH_S)
        with Live(screen(_status(settings)), console=console, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(_REFRESH_S)
                live.update(screen(_status(settings)), refresh=True)


def report(
    config: ConfigOption = None,
    out: Annotated[Path, typer.Option(help="The page that is written.")] = Path("hogwild-report.html"),
) -> None:
    """Write one self-contained HTML page: losses by file, probes over time, update sizes, serving latency."""
    from hogwild.report import page

    settings = configuration.load(config)
    there = out.exists()
    try:
        with out.open("a", encoding="utf-8") as file:  # by who asks, who may be root: the page is theirs
            owner.become(settings.state_dir)
            text = page(settings)
            with contextlib.suppress(OSError):  # a pipe has nothing to cut
                file.truncate(0)
            file.write(text)
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):
                out.unlink()
        raise
    typer.echo(str(out))


def quarantine(
    examples: Annotated[list[int] | None, typer.Argument(help="Numbers of examples; default: all.")] = None,
    config: ConfigOption = None,
    file: Annotated[
        str | None, typer.Option(help="Only those of files that were dropped under this name.")
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Let them out, to be trained again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what guards have set aside, and why; or let it try again with --retrain. Needs no running daemon."""
    from hogwild.ledger import Ledger

    settings = configuration.load(config)
    owner.become(settings.state_dir)
    if not (settings.state_dir / "ledger.sqlite").exists():
        raise HogwildError(f"nothing was learned yet in {settings.state_dir}")
    if retrain:
        count = _release(settings, examples, file)
        if not count and (examples or file) and not as_json:
            raise HogwildError("nothing of that is in quarantine: `hogwild quarantine` lists what is")
        said = f"{counted(count, 'example is', 'examples are')} trained again"
        typer.echo(json.dumps({"examples": count}) if as_json else said)
        return
    with Ledger(settings.state_dir / "ledger.sqlite", readonly=True) as ledger:
        all_of_them = ledger.guards.suspects()
    found = [
        one
        for one in all_of_them
        if (not examples or one.example_id in examples) and file in (None, one.file)
    ]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
        return
    if not found:
        others = len(all_of_them)
        typer.echo(
            f"none of the {others} examples in quarantine is one of these"
            if others > 1
            else "the one example in quarantine is another one"
            if others
            else "nothing is in quarantine"
        )
        return
    from rich.table import Table
    from rich.text import Text

    from hogwild import terminal

    table = Table(box=None, pad_edge=False)
    for heading in ("example", "file", "line", "id", "guard", "since", "why", "measured"):
        right = heading in ("example", "line")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for one in found:
        cells = (one.example_id, one.file, one.line_no, one.name or "", one.guard, one.at[:19], one.reason)
        table.add_row(*(Text(terminal.plain(cell)) for cell in (*cells, _measured(one))))
    terminal.console().print(table)


def _measured(one: "Suspect") -> str:
    """Nats a token: "own 0.450 -> 1.812 (0.25 allowed); its loss 4.00 -> 0.60"."""
    said = []
    if one.guard == "probes":
        scores = (
            f"{name} {_nats(score['was'], 3)} -> {_nats(score['is'], 3)} ({score['margin']:g} allowed)"
            for name, score in one.measured.items()
        )
        said.append(", ".join(scores))
    if one.first_loss is not None or one.last_loss is not None:
        said.append(f"its loss {_nats(one.first_loss, 2)} -> {_nats(one.last_loss, 2)}")
    if one.guard == "loss" and (strikes := one.about.get("strikes")):
        losses = ", ".join(_nats(strike["loss"], 2) for strike in strikes)
        said.append(f"its loss when it was refused: {losses}")
    return "; ".join(said)


def _nats(value: float | None, digits: int) -> str:
    return "not a number" if value is None else f"{value:.{digits}f}"


def _release(settings: "Config", examples: list[int] | None, file: str | None) -> int:
    if state_lock.holder(settings.state_dir) is not None:
        done = commands.send(settings.socket, "retrain", examples=examples or None, file=file)
        return int(done["examples"])
    from hogwild import log
    from hogwild.ledger import Ledger

    log.configure("error", settings.log.format, sys.stderr)
    lock = state_lock.take(settings.state_dir)
    try:
        with Ledger(settings.state_dir / "ledger.sqlite") as ledger:
            return ledger.guards.release(examples or None, file=file)
    finally:
        os.close(lock)


def _status(settings: "Config") -> dict[str, Any]:
    pid = state_lock.holder(settings.state_dir)
    if pid is None:
        raise running.none_in(settings.state_dir)
    return running.status(settings.state_dir, pid)
