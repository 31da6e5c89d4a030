"""The command line. Exit codes: 0 ok, 1 failed, 2 usage, 78 bad configuration."""

import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hogwild import __version__, cli_history, cli_service, cli_watch, heap, journal, openmp, probe_file
from hogwild import config as configuration
from hogwild.cli_history import ConfigOption, JsonOption
from hogwild.ending import Ending
from hogwild.errors import ConfigError, HogwildError, UsageError
from hogwild.notify import Notifier
from hogwild.settings import Config

app = typer.Typer(
    name="hogwild",
    help="Continual learning for self-hosted LLMs: the weights that vLLM serves keep moving while it serves.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    Path | None, typer.Option(help="Folder of the model: counts tokens and shows what is trained.")
]


@app.command()
def serve(
    config: ConfigOption = None,
    model: Annotated[str, typer.Option(help="Folder of the model; default: what the server offers.")] = "",
) -> None:
    """Run the daemon: watch the spool, train the weights that the server reads, write checkpoints."""
    import signal

    overrides = {"model": str(Path(model).resolve()) if model else None}
    settings = _load_or_tell_the_journal(config, overrides, probe_file.check)
    for number in (signal.SIGHUP, signal.SIGUSR1):  # both end a process that does not listen to them yet
        signal.signal(number, signal.SIG_IGN)
    openmp.sleep_when_idle(os.environ)
    from hogwild import governor, log

    governor.prepare_gpu(settings.training, os.environ)
    from hogwild.supervisor import Supervisor  # torch and transformers: seconds that --help should not take

    log.configure(settings.log.level, settings.log.format)
    raise typer.Exit(Supervisor(settings, config, overrides).run())


class _PassesOn(TyperCommand):
    """Keeps click from reading vLLM's `-cc` as our `-c` and a value: an option of three dashes it passes on."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [re.sub(r"^-(?=\w\w)", "---", one) for one in args])


@app.command(cls=_PassesOn, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Model folder or name, as for `vllm serve`.", show_default="server.model")
    ] = "",
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
    from hogwild.vllm_plugin.arguments import in_full, option

    settings = _load_or_tell_the_journal(config)
    model, *passed = (re.sub(r"^---", "-", one) for one in (model, *context.args))  # see `_PassesOn`
    if model.startswith("-"):  # the first argument is an option: the model is the configured one
        model, passed = "", [model, *passed]
    arguments = [*settings.server.arguments, *passed]
    if why := launch.missing(model):
        raise UsageError(why)
    model = model or settings.server.model or settings.model or option(in_full(arguments), "--model") or ""
    if why := launch.missing(model):  # of a service: its disk may be late, and the next try may find it
        typer.echo(f"hogwild: {why}", err=True)
    if not model:
        raise ConfigError(
            "no model: name its folder, before any option of vLLM, or set `model` in the configuration"
        )
    launch.refuse(arguments)
    said = "VLLM_CPU_KVCACHE_SPACE" in os.environ  # vLLM's own variable
    command = launch.command(model, arguments, available=0 if said else heap.available())
    environment = launch.environment(
        settings.socket, settings.state_dir, arguments, os.environ, base_weights=base_weights
    )
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def _load_or_tell_the_journal(
    config: Path | None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    check: Callable[[Config], None] = lambda _config: None,
) -> Config:
    """As `load`, then `check`; what is wrong is the last that `systemctl status` shows of a service that cannot run."""
    try:
        settings = configuration.load(config, overrides)
        check(settings)
    except ConfigError as error:
        Notifier().send(f"STATUS={error}")
        raise
    return settings


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Files as they would be dropped into the spool.")],
    model: ModelOption = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show every token and where it ends.")] = False,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Show every line of FILES as it will be trained, without training it. Exit code 1 if a line is wrong."""
    from rich.console import Console

    from hogwild.check import Checker

    settings = configuration.load(config)
    folder = model or (Path(settings.model) if settings.model else None)
    if tokens and folder is None:
        raise UsageError("--tokens needs --model: the tokens are the model's")
    checker = Checker.of(settings, Console(quiet=as_json), folder, tokens=tokens)
    for record in checker.files(files):
        if as_json:
            typer.echo(json.dumps(record))
    checker.sum_up()
    raise typer.Exit(1 if checker.bad else 0)


@app.command()
def train(
    files: Annotated[list[Path], typer.Argument(help="Files as they would be dropped into the spool.")],
    model: Annotated[Path, typer.Option(help="Folder of the model; only read.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained model; made, or empty.")],
    passes: Annotated[int | None, typer.Option(help="Instead of training.passes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Instead of optimizer.lr.")] = None,
    threads: Annotated[int | None, typer.Option(help="Instead of training.threads.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the ledger and the optimizer; an interrupted run goes on from it."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or a GPU that this process sees: cuda, cuda:1.")] = "cpu",
    strict: Annotated[bool, typer.Option("--strict", help="Train nothing if a line is wrong.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train MODEL on FILES without a server, and write the result to a folder of its own. Ctrl-C saves and stops."""
    overrides = {"training.passes": passes, "optimizer.lr": lr, "training.threads": threads}
    settings = configuration.load(config, overrides)

    openmp.sleep_when_idle(os.environ)
    from hogwild import log
    from hogwild.train_command import run

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: give cpu, cuda, or cuda: and the number of a GPU")
    if device != "cpu":
        from hogwild import governor

        governor.prepare_gpu(settings.training, os.environ)
    log.configure("debug" if settings.log.level == "debug" else "warning", settings.log.format, sys.stderr)
    raise typer.Exit(
        run(files, settings, model.absolute(), out.absolute(), state, device, strict=strict, as_json=as_json)
    )


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


cli_history.register(app)
cli_watch.register(app)
cli_service.register(app)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


_OF_A_FILE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def main() -> None:
    """Entry point: a user's mistake is a message, not a traceback."""
    end = Ending()
    try:
        _run()
    except SystemExit as ended:
        end.told(ended)
        raise


def _run() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no UTF-8 is no reason to fail
    try:
        app()
    except _OF_A_FILE as error:
        # Of the daemon, the log keeps where it came from.
        if error.filename is None or sys.argv[1:2] == ["serve"]:
            raise
        hint = ": run it as the owner of that, or as root" if isinstance(error, PermissionError) else ""
        typer.echo(f"hogwild: {error.filename}: {error.strerror}{hint}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or sys.argv[1:2] == ["serve"]:
            raise
        typer.echo(f"hogwild: {error.strerror}: what was written is not complete", err=True)
        sys.exit(1)
    except HogwildError as error:
        if journal.is_stderr():
            from hogwild import log

            log.configure(stream=sys.stderr)
            log.get(__name__).error("daemon.failed", error=str(error), code=error.exit_code)
        else:
            typer.echo(f"hogwild: {error}", err=True)
        sys.exit(error.exit_code)
