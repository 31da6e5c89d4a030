"""`hogwild check FILE...`: every line as it will be trained, without training it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from hogwild.config import Config
from hogwild.encoding import Encoded, Tokenizer
from hogwild.errors import ExampleError, UsageError
from hogwild.examples import Example, encode
from hogwild.ledger_records import BadLine, GoodLine
from hogwild.lines import SUFFIXES, DamagedFileError, read_lines

SHOWN_CONTEXT_TOKENS = 64  # the end of a long context is what matters before the trained tokens


def check(
    files: Sequence[Path], config: Config, console: Console, tokenizer: Tokenizer | None = None
) -> list[dict[str, object]]:
    """Prints one line per line: ok or the reason why not.

    Args:
        tokenizer: the model's; with it, token counts and the text as it will be trained: context dim, trained
            tokens bright.

    Returns:
        One record per line, for `--json`: file, line, ok, and reason and field or tokens and trained_tokens.

    Raises:
        UsageError: a file cannot be read.
    """
    records: list[dict[str, object]] = []
    for path in files:
        if not path.name.endswith(SUFFIXES):
            console.print(
                f"[yellow]{escape(str(path))}[/]: the spool takes only {', '.join(SUFFIXES)} files",
                highlight=False,
            )
        try:
            records += _check_lines(
                path,
                read_lines(path, config.spool.max_line_bytes),
                _encoder(config, tokenizer),
                console,
                tokenizer,
            )
        except (DamagedFileError, OSError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error
    good = sum(1 for record in records if record["ok"])
    style = "green" if good == len(records) else "red"
    console.print(f"[{style}]{good} of {len(records)} lines will be trained[/]", highlight=False)
    return records


def _encoder(config: Config, tokenizer: Tokenizer | None) -> Callable[[Example], Encoded | None]:
    def encoder(example: Example) -> Encoded | None:
        if tokenizer is None:
            return None
        training = config.training
        return encode(example, tokenizer, max_tokens=training.max_tokens, train_on=training.train_on)

    return encoder


def _check_lines(
    path: Path,
    lines: Iterable[GoodLine | BadLine],
    encoder: Callable[[Example], Encoded | None],
    console: Console,
    tokenizer: Tokenizer | None,
) -> Iterable[dict[str, object]]:
    for line in lines:
        record: dict[str, object] = {"file": str(path), "line": line.line_no}
        field, reason = None, None
        encoded = None
        if isinstance(line, BadLine):
            field, reason = line.field, line.reason
        else:
            try:
                encoded = encoder(line.example)
            except ExampleError as error:
                field, reason = error.field, error.reason
        where = escape(f"{path.name}:{line.line_no}")
        if reason is not None:
            what = f"{field}: {reason}" if field else reason
            console.print(f"[red]err[/] {where} {escape(what)}", highlight=False)
            yield {**record, "ok": False, "field": field, "reason": reason}
            continue
        counts = {}
        text = Text()
        if encoded is not None and tokenizer is not None:
            counts = {"tokens": len(encoded.ids), "trained_tokens": encoded.trained_tokens}
            text = render(encoded, tokenizer)
        shown = f" {counts['trained_tokens']} of {counts['tokens']} tokens trained" if counts else ""
        console.print(f"[green]ok [/] {where}{shown}", highlight=False)
        if text:
            console.print(text)
        yield {**record, "ok": True, **counts}


def render(encoded: Encoded, tokenizer: Tokenizer) -> Text:
    """The example's text: context dim, trained tokens bright."""
    text = Text()
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    for trained, ids in runs:
        cut = not trained and len(ids) > SHOWN_CONTEXT_TOKENS
        words = str(tokenizer.decode(ids[-SHOWN_CONTEXT_TOKENS:] if cut else ids))
        text.append(("... " if cut else "") + words, style="bold bright_green" if trained else "dim")
    return text
