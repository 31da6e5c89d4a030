"""Commands about what was saved: checkpoint, history, diff, export, rollback."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hogwild import commands, fresh_folder, owner, progress, running, state_lock
from hogwild import config as configuration
from hogwild.errors import HogwildError
from hogwild.plural import counted

if TYPE_CHECKING:
    from hogwild.history import History
    from hogwild.settings import Config

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="HOGWILD_CONFIG",
        callback=lambda path: path or configuration.find(),
        show_default="~/.config/hogwild/hogwild.toml, else /etc/hogwild/hogwild.toml, if there",
        help="TOML file; `hogwild config` says what it and the environment come to.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (checkpoint, history, diff, export, rollback):
        app.command()(command)


def checkpoint(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Have the running daemon write a checkpoint now; wait for it and print its generation."""
    settings = configuration.load(config)
    owner.become(settings.state_dir)
    if state_lock.holder(settings.state_dir) is None:
        raise running.none_in(settings.state_dir)
    with progress.waiting("the daemon writes a checkpoint"):
        saved = commands.send(settings.socket, "checkpoint")
    if as_json:
        typer.echo(json.dumps(saved))
    elif saved["unchanged"]:
        typer.echo(f"generation {saved['generation']} holds everything already: {saved['path']}")
    else:
        typer.echo(f"generation {saved['generation']}, step {saved['step']}: {saved['path']}")


def history(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the generations that can be gone back to. Needs no running daemon."""
    from hogwild import history_report

    settings = configuration.load(config)
    owner.become(settings.state_dir)
    records = history_report.listing(settings.state_dir)
    if as_json:
        typer.echo(json.dumps(records))
        return
    if not records:
        raise HogwildError(f"nothing was saved yet in {settings.state_dir}")
    _print_table(records)


def diff(
    a: Annotated[int, typer.Argument(help="The older generation; 0 is the model as it came.", min=0)],
    b: Annotated[int, typer.Argument(help="The newer generation.", min=0)],
    config: ConfigOption = None,
    layers: Annotated[int, typer.Option(help="Layers to show; 0: all.", min=0)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Say which layers moved how much between two generations: |B - A| / |A|, the largest first."""
    from hogwild import history_report
    from hogwild.history_diff import changes

    records = history_report.grouped(changes(_open(configuration.load(config), a, b), a, b))
    if as_json:
        typer.echo(json.dumps(records))
        return
    for record in records[: layers or None]:
        typer.echo(
            f"{record['change']:>10.3e}  {record['layer']}  ({counted(record['elements'], 'element')} moved)"
        )
        for name, change in record["tensors"].items():
            if change and name != record["layer"]:
                typer.echo(f"{change:>14.3e}  {name}")
    if layers and len(records) > layers:
        typer.echo(f"... and {len(records) - layers} more (--layers 0 shows all)")


def export(
    generation: Annotated[int, typer.Argument(help="Number of the generation.", min=0)],
    folder: Annotated[
        Path, typer.Argument(help="Where to write it: a folder that is empty or does not exist.")
    ],
    config: ConfigOption = None,
) -> None:
    """Write a generation as a plain Hugging Face folder, bit-identical to what was saved."""
    fresh_folder.refuse(folder)  # before anything takes long
    history = _open(configuration.load(config), generation)
    with progress.writing(f"generation {generation}"):
        history.export(generation, folder)
    typer.echo(f"generation {generation}: {folder}")


def rollback(
    generation: Annotated[
        int, typer.Argument(help="Number of the generation; 0 is the model as it came.", min=0)
    ],
    config: ConfigOption = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train again what is undone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Go back to a generation: in the served weights, on disk, and in the ledger. The server serves on meanwhile.

    Examples that were trained since then stay out, unless --retrain. Without a running daemon it takes effect when the
    next one starts.
    """
    settings = configuration.load(config)
    owner.become(settings.state_dir)
    if state_lock.holder(settings.state_dir) is not None:
        with progress.waiting(f"the daemon goes back to generation {generation}"):
            done = commands.send(settings.socket, "rollback", generation=generation, retrain=retrain)
    else:
        with progress.waiting(f"going back to generation {generation}"):
            done = _roll_back_offline(settings, generation, retrain)
    if as_json:
        typer.echo(json.dumps(done))
        return
    if done["generation"] != generation:
        typer.echo(
            f"generation {generation} is damaged (see the log): went back to the last good one before it",
            err=True,
        )
    back = (
        f", {counted(redone, 'pass is', 'passes are')} back" if (redone := done.get("passes_redone")) else ""
    )
    where = (
        "in the served weights"
        if done["live"]
        else "on disk; a server that runs gets it when the daemon does"
    )
    typer.echo(
        f"generation {done['generation']}, {where}: {counted(done['passes_undone'], 'pass', 'passes')} undone, "
        f"{counted(done['examples_reopened'], 'example is', 'examples are')} trained again, "
        f"{counted(done['examples_undone'], 'stays', 'stay')} out"
        f"{back}, {done['ms']} ms"
    )


def _roll_back_offline(settings: "Config", generation: int, retrain: bool) -> dict[str, Any]:
    import os

    from hogwild import log
    from hogwild import rollback as rolling
    from hogwild.keeper import Keeper
    from hogwild.ledger import Ledger

    if not (settings.state_dir / "ledger.sqlite").exists():
        raise HogwildError(f"nothing was saved yet in {settings.state_dir}")
    log.configure("error", settings.log.format, sys.stderr)
    lock = state_lock.take(settings.state_dir)
    try:
        with Ledger(settings.state_dir / "ledger.sqlite") as ledger:
            keeper = Keeper(settings)
            try:
                rolling.finish_on_disk(ledger, keeper)
                return rolling.roll_back(
                    generation, retrain=retrain, ledger=ledger, keeper=keeper, learner=None
                )
            finally:
                keeper.close()
    finally:
        os.close(lock)


def _open(settings: "Config", *wanted: int) -> "History":
    """History, to be read only: a daemon may be at work in it."""
    from hogwild import log
    from hogwild.history import History

    log.configure("error", settings.log.format, sys.stderr)
    history = History.reading(settings)
    for generation in wanted:
        if not history.known(generation):
            raise HogwildError(history.unknown(generation, history.nodes()))
    return history


def _print_table(records: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from hogwild import terminal

    table = Table(box=None, pad_edge=False)
    probes = any(record.get("probes") for record in records)
    for heading in ("", "generation", "saved at", "step", "examples", "passes", "loss", "size", "") + (
        ("probes",) if probes else ()
    ):
        left = heading in ("", "saved at", "probes")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for record in records:
        if "problem" in record:
            table.add_row("!", str(record["generation"]), "damaged")
            continue
        losses = (record["loss_before"], record["loss_after"])
        remarks = [
            *(["complete folder"] if record["folder_bytes"] else []),
            *(
                [f"after {record['parent']}"]
                if record["parent"] not in (None, record["generation"] - 1)
                else []
            ),
            *(["undone"] if record["undone"] else []),
            *([] if record["restorable"] else ["cannot be restored"]),
        ]
        row = [
            "*" if record["current"] else "",
            str(record["generation"]),
            record["saved_at"],
            str(record["step"]),
            *(str(record[key]) if record[key] is not None else "" for key in ("examples", "passes")),
            " -> ".join(f"{loss:.2f}" for loss in losses if loss is not None),
            f"{(record['bytes'] + record['folder_bytes']) / 2**20:.1f} MiB",
            ", ".join(remarks),
        ]
        scores = ", ".join(f"{name} {loss:.3f}" for name, loss in (record.get("probes") or {}).items())
        table.add_row(*row, *([scores] if probes else []))
    terminal.console().print(table)
