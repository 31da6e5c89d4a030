"""What `hogwild train` shows: the lines that are wrong, a progress bar, the losses of each file before and after."""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from hogwild import terminal
from hogwild.check import Checker, freezes, tokenizer_in
from hogwild.encoding import context_length
from hogwild.errors import HogwildError, UsageError
from hogwild.ledger_records import GoodLine
from hogwild.lines import DamagedFileError, read_lines
from hogwild.plural import counted
from hogwild.settings import Config

if TYPE_CHECKING:
    from hogwild.one_shot import Now, Result

_STOPS = (signal.SIGINT, signal.SIGTERM)
_ECHO_S = 1.0
"""TERM that comes so soon after the first signal is the same one: timeout(1) sends it to its child, and to the group
that the child is in."""


def run(
    files: Sequence[Path],
    config: Config,
    model: Path,
    out: Path,
    state: Path | None,
    device: str = "cpu",
    *,
    strict: bool,
    as_json: bool,
) -> int:
    """Check, train and report; everything but the result goes to stderr. Returns the exit code.

    Raises:
        HogwildError: nothing has been written to `out`.
    """
    _refuse(files, model, out)
    console = Console(stderr=True)
    _refuse_lines(files, config, console)
    from transformers.utils import logging as transformers_logging

    from hogwild.one_shot import OneShot  # torch: seconds that a refusal should not take

    transformers_logging.disable_progress_bar()
    shot = OneShot(config, model, out, state, device)
    _check(files, config, model, console, strict)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error}") from error
    with _interrupting(shot.interrupt, console), _Bar(console) as bar:
        result = shot.run(list(dict.fromkeys(files)), bar.show)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
    else:
        _report(result)
    return 0


def _refuse(files: Sequence[Path], model: Path, out: Path) -> None:
    """What cannot work, before anything long begins.

    Raises:
        UsageError: a file or the model is not there, or `out` is in the way.
    """
    for path in files:
        if not path.is_file():
            why = "it is not a plain file" if path.exists() else "there is no such file"
            raise UsageError(f"{path}: cannot be read: {why}")
    if not (model / "config.json").is_file():
        raise UsageError(f"--model {model}: no config.json there; give the folder of a Hugging Face model")
    if _quantised(model):
        raise UsageError(
            f"--model {model}: its weights are quantised; give the model that they were made from, in bf16 or fp16"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: is there already; give a folder that is not, or an empty one")


def _quantised(model: Path) -> bool:
    try:
        described = json.loads((model / "config.json").read_bytes())
        return any(
            part.get("quantization_config") for part in (described, described.get("text_config") or {})
        )
    except (OSError, ValueError, AttributeError):
        return False  # whoever loads the model says what is wrong with it


def _refuse_lines(files: Sequence[Path], config: Config, console: Console) -> None:
    """Files without one line of the right form; whether this model can train the others takes its tokenizer.

    Raises:
        HogwildError: there is none; all that is wrong has been printed.
        UsageError: a file cannot be read.
    """
    try:
        lines = (line for path in files for line in read_lines(path, config.spool.max_line_bytes))
        if any(isinstance(line, GoodLine) for line in lines):
            return
    except (DamagedFileError, OSError):
        pass  # the checker says which file, and why
    _sum_up(Checker(config, console, problems_only=True), files)


def _sum_up(checker: Checker, files: Sequence[Path]) -> None:
    for _ in checker.files(files):
        pass
    checker.sum_up()
    if not checker.good:
        raise HogwildError("no line can be trained")


def _check(files: Sequence[Path], config: Config, model: Path, console: Console, strict: bool) -> None:
    """As `hogwild check`, but silent about what is well."""
    checker = Checker(
        config,
        console,
        tokenizer_in(model),
        context_length(model),
        freezes(model, config.training),
        problems_only=True,
    )
    _sum_up(checker, files)
    if strict and checker.bad:
        raise HogwildError(
            f"{counted(checker.bad, 'line is', 'lines are')} wrong, and --strict was given: nothing was trained"
        )


class _interrupting:  # noqa: N801 - used as a function
    """Ctrl-C or TERM calls `interrupt`; the next one, of either, raises KeyboardInterrupt, and nothing is written. One
    more ends the process as it would any."""

    def __init__(self, interrupt: Callable[[], None], console: Console) -> None:
        self._interrupt, self._console = interrupt, console
        self._told_at: float | None = None

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._told) for number in _STOPS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _told(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._told_at is not None:
            if number == signal.SIGTERM and now - self._told_at < _ECHO_S:
                return
            for one in _STOPS:
                signal.signal(one, signal.SIG_DFL)
            raise KeyboardInterrupt  # not the end at once, which would count as a crash of what is being trained
        self._told_at = now
        self._console.print("[yellow]finishing the passes under way and saving; once more to give up[/]")
        self._interrupt()


class _Bar:
    """One line that moves on a terminal; nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("passes  loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("loading", total=None, loss="-")

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, now: "Now") -> None:
        self._progress.update(
            self._task,
            description="training" if now.passes_done or not now.passes_left else "preparing",
            completed=now.passes_done,
            total=now.passes_done + now.passes_left,
            loss="-" if now.loss is None else f"{now.loss:.3f}",
        )


def _report(result: "Result") -> None:
    console = terminal.console()
    table = Table(box=None, pad_edge=False)
    for heading in ("file", "examples", "wrong", "loss before", "after", "measured on"):
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    for one in result.files:
        losses = ["" if loss is None else f"{loss:.3f}" for loss in (one.loss_before, one.loss_after)]
        name = f"{one.file} (the same as {one.same_as})" if one.same_as else one.file
        table.add_row(
            escape(name), str(one.examples), str(one.rejected + one.failed), *losses, str(one.measured)
        )
    console.print(table, highlight=False)
    what = "stopped early after" if result.interrupted else "finished after"
    done = f"{counted(result.passes, 'pass', 'passes')} in {counted(result.steps, 'step')}"
    console.print(
        f"{what} {done}, {result.seconds:.0f} s: {result.out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
