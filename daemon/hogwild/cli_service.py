"""Commands about the installation: config, doctor, install, uninstall."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hogwild import config as configuration
from hogwild import config_report, presets, probe_file
from hogwild.cli_history import ConfigOption, JsonOption
from hogwild.errors import UsageError

RootOption = Annotated[
    Path | None, typer.Option("--root", help="Install into this folder, as into an image of a system.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help=f"Begin with settings for: {', '.join(presets.names())}.", autocompletion=presets.names
    ),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (config, doctor, install, uninstall):
        app.command()(command)


def config(
    key: Annotated[
        str,
        typer.Argument(
            help="Print this value, or this table, alone.",
            autocompletion=config_report.keys,
            show_default="all",
        ),
    ] = "",
    config: ConfigOption = None,
    check: Annotated[bool, typer.Option("--check", help="Print nothing unless something is wrong.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out what has its default.")] = False,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the effective configuration, and where each value comes from. Exit code 78 if it is wrong.

    With --preset: print a complete, commented configuration file that begins with these settings.
    """
    if preset is not None:
        typer.echo(presets.file(preset), nl=False)
        return
    settings = config_report.effective(config)
    if check:
        probe_file.check(configuration.load(config))
        return
    if key:
        if found := [one for one in settings if one.key == key]:
            typer.echo(json.dumps(found[0].as_json()) if as_json else found[0].shown)
            return
        settings = [one for one in settings if one.key.startswith(f"{key}.")]
        if not settings:
            raise UsageError(f"{key}: {configuration.unknown_key(tuple(key.split('.')))}")
    if changed:
        settings = [one for one in settings if one.origin != config_report.DEFAULT]
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in settings]))
    else:
        config_report.show(settings, config)


def doctor(
    config: ConfigOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what takes seconds: the GPU, and vLLM with the plugin.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Only say what would be trained of the model in this folder, frozen and refused, and why. vLLM loads "
            "it for that, once, and serves nothing."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check everything that can be wrong before it is, and say how to mend it. Exit code 1 if something is."""
    from hogwild.doctor import examine

    raise typer.Exit(examine(config, quick=quick, as_json=as_json, model=model))


def install(
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model; else name it in the configuration.")
    ] = None,
    preset: PresetOption = None,
    root: RootOption = None,
    program: Annotated[
        Path | None, typer.Option(help="Path of `hogwild` as the units call it; default: this one.")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Write systemd units, the user "hogwild", folders and a commented configuration. Overwrites no configuration.

    Run it again after an upgrade. Changes of your own belong into `systemctl edit hogwild`, which it leaves alone.
    """
    from hogwild import installation

    if preset is not None:
        presets.values(preset)  # a wrong name is said before anything is written
    work = installation.Installation(root, program, dry_run=dry_run, say=typer.echo)
    work.install(model.absolute() if model else None, preset)


def uninstall(root: RootOption = None, dry_run: DryRunOption = False) -> None:
    """Stop the services and remove what `install` wrote; keep the configuration, and everything that was learned."""
    from hogwild import installation

    installation.Installation(root, None, dry_run=dry_run, say=typer.echo).uninstall()
