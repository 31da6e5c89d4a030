"""The command line. Exit codes: 0 ok, 1 failed, 2 usage, 78 bad configuration."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hogwild import __version__
from hogwild import config as configuration
from hogwild.errors import HogwildError, UsageError

app = typer.Typer(
    name="hogwild",
    help="Continual learning for self-hosted LLMs: the weights that vLLM serves keep moving while it serves.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="HOGWILD_CONFIG", help="TOML file; see config/hogwild.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def serve(
    config: ConfigOption = None,
    model: Annotated[str, typer.Option(help="Folder of the model; default: what the server offers.")] = "",
) -> None:
    """Run the daemon: watch the spool, train the weights that the server reads, write checkpoints."""
    from hogwild import log
    from hogwild.supervisor import Supervisor  # torch and transformers: seconds that --help should not take

    settings = configuration.load(config, {"model": str(Path(model).resolve()) if model else None})
    log.configure(settings.log.level, settings.log.format)
    raise typer.Exit(Supervisor(settings, config).run())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or name, as for `vllm serve`.")],
    config: ConfigOption = None,
) -> None:
    """Start `vllm serve MODEL` with its weights where the daemon can train them. Takes any `vllm serve` argument."""
    from hogwild.vllm_plugin import launch

    settings = configuration.load(config)
    command = launch.command(model, context.args)
    environment = launch.environment(settings.socket, context.args, os.environ)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Say what the daemon is doing."""
    settings = configuration.load(config)
    path = settings.state_dir / "status.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise HogwildError(
            f"no daemon has written {path} yet: is it running, with this configuration?"
        ) from None
    data["alive"] = Path(f"/proc/{data['pid']}").exists()
    if as_json:
        typer.echo(json.dumps(data))
    else:
        for key, value in data.items():
            typer.echo(f"{key:>14}  {value}")


@app.command()
def checkpoint(config: ConfigOption = None) -> None:
    """Ask the running daemon to write a checkpoint now."""
    import signal

    settings = configuration.load(config)
    path = settings.state_dir / "status.json"
    try:
        pid = int(json.loads(path.read_text())["pid"])
        os.kill(pid, signal.SIGUSR1)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HogwildError(f"no daemon is running with the state folder {settings.state_dir}") from error
    typer.echo(f"asked process {pid}; watch for checkpoint.saved in its log")


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a chat model; default: SmolLM2-135M-Instruct.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where the demo keeps its model and its run.")] = Path(
        ".demo"
    ),
) -> None:
    """Watch a real vLLM server learn a file while it serves."""
    from rich.console import Console

    from hogwild.demo import Demo

    if model is not None and not (model / "config.json").is_file():
        raise UsageError(f"--model {model}: no config.json there; give the folder of a Hugging Face model")
    raise typer.Exit(Demo(folder.resolve(), model.resolve() if model else None, Console()).run())


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: a user's mistake is a message, not a traceback."""
    try:
        app()
    except HogwildError as error:
        typer.echo(f"hogwild: {error}", err=True)
        sys.exit(error.exit_code)
