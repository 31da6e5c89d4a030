"""The command line. Exit codes: 0 ok, 1 failed, 2 usage, 78 bad configuration."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hogwild import __version__, state_lock
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
    import signal

    overrides = {"model": str(Path(model).resolve()) if model else None}
    settings = configuration.load(config, overrides)
    for number in (signal.SIGHUP, signal.SIGUSR1):  # both end a process that does not listen to them yet
        signal.signal(number, signal.SIG_IGN)
    from hogwild import log
    from hogwild.supervisor import Supervisor  # torch and transformers: seconds that --help should not take

    log.configure(settings.log.level, settings.log.format)
    raise typer.Exit(Supervisor(settings, config, overrides).run())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or name, as for `vllm serve`.")],
    config: ConfigOption = None,
    base_weights: Annotated[
        bool,
        typer.Option(
            "--base-weights", help="Begin with the model as it came, not with its newest checkpoint."
        ),
    ] = False,
) -> None:
    """Start `vllm serve MODEL` with its weights where the daemon can train them. Takes any `vllm serve` argument.

    It begins with what the daemon holds, or with the newest checkpoint of MODEL in the state folder.
    """
    from hogwild.vllm_plugin import launch

    settings = configuration.load(config)
    command = launch.command(model, context.args)
    environment = launch.environment(
        settings.socket, settings.state_dir, context.args, os.environ, base_weights=base_weights
    )
    sys.stdout.flush()
    os.execve(command[0], command, environment)


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Say what the daemon is doing."""
    settings = configuration.load(config)
    pid = _daemon(settings.state_dir)
    data = {"pid": pid, "training": False}  # until a server has brought its weights
    try:
        written = json.loads((settings.state_dir / "status.json").read_text())
        if written["pid"] == pid:  # not what an earlier daemon left
            data = written
    except FileNotFoundError:
        pass
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
    pid = _daemon(settings.state_dir)
    try:
        os.kill(pid, signal.SIGUSR1)
    except OSError as error:
        raise HogwildError(f"the daemon, process {pid}, cannot be asked: {error}") from error
    typer.echo(f"asked process {pid}; watch for checkpoint.saved in its log")


def _daemon(state_dir: Path) -> int:
    """Process id of the daemon that works in `state_dir`."""
    pid = state_lock.holder(state_dir)
    if pid is None:
        raise HogwildError(f"no daemon is running with the state folder {state_dir}")
    return pid


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Files as they would be dropped into the spool.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model: counts tokens and shows what is trained.")
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Show every line of FILES as it will be trained, without training it. Exit code 1 if a line is wrong."""
    from rich.console import Console

    from hogwild import check as checking

    settings = configuration.load(config)
    tokenizer = None
    if model is not None:
        from transformers import AutoTokenizer  # only here: it takes seconds

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {model}: no tokenizer there: {error}") from error
    records = checking.check(files, settings, Console(quiet=as_json), tokenizer)
    if as_json:
        for record in records:
            typer.echo(json.dumps(record))
    raise typer.Exit(0 if all(record["ok"] for record in records) else 1)


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
