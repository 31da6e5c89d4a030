"""`hogwild check FILE...`: every line as it will be trained, without training it."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from hogwild.cautions import Caution, cautions
from hogwild.chat_settings import ChatSettings
from hogwild.check_text import Shown, show
from hogwild.encoding import Encoded, Tokenizer, context_length, stop_texts
from hogwild.errors import ExampleError, UsageError
from hogwild.examples import Example, encode
from hogwild.ledger_records import BadLine, GoodLine
from hogwild.lines import SUFFIXES, DamagedFileError, read_lines
from hogwild.plural import counted
from hogwild.settings import Config, TrainingConfig
from hogwild.terminal import plain

Record = dict[str, object]


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of the model in `folder`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"--model {folder}: there is no such folder")
    from transformers import AutoTokenizer  # only here: it takes seconds

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # nothing more special is raised by tokenizers for a file of another version
        said = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        why = " ".join(said.split())  # of several lines
        raise UsageError(f"--model {folder}: no tokenizer there: {why:.160}") from error


def freezes(folder: Path, training: TrainingConfig) -> bool:
    """Can the context of the model in `folder` be frozen? False: its code rules it out, as layers that share keys and
    values do. What only the weights can tell is left to the daemon (`context.not_frozen`), and so is a model that
    cannot be built."""
    if training.most_trained == training.max_tokens:
        return True  # nothing depends on it
    from hogwild.context import Layers  # only here: torch takes seconds
    from hogwild.skeleton import empty

    try:
        return Layers(empty(folder)).known
    except Exception:  # transformers raises what it likes for a folder that it cannot use
        return True


@dataclass
class Checker:
    """Prints what becomes of each line.

    Args:
        tokenizer: the model's; without it only the form of a line is checked.
        context_length: longest text that the model takes, in tokens, if it is known.
        stops: texts of the tokens at which the server ends an answer, from `encoding.stop_texts`.
        freezes: can the model's context be frozen?
        tokens: show where each token begins and ends, and all of them.
        problems_only: say nothing of lines that are well.
    """

    config: Config
    console: Console
    tokenizer: Tokenizer | None = None
    context_length: int | None = None
    stops: Collection[str] = ()
    freezes: bool = True
    tokens: bool = False
    problems_only: bool = False
    good: int = 0
    bad: int = 0
    doubtful: int = 0
    _seen: dict[bytes, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, console: Console, model: Path | None, **options: Any) -> "Checker":
        """For the model in a folder, if there is one.

        Raises:
            UsageError: see `tokenizer_in`.
        """
        if model is None:
            return cls(config, console, **options)
        tokenizer = ChatSettings.of_arguments(config.server.arguments).on(tokenizer_in(model))
        return cls(
            config,
            console,
            tokenizer,
            context_length(model),
            stop_texts(model, tokenizer),
            freezes(model, config.training),
            **options,
        )

    def files(self, files: Sequence[Path]) -> Iterator[Record]:
        """Checks files, printing as it goes.

        Yields:
            One record per line, for `--json`: file, line and ok; if it is, id, form, warnings and, with a tokenizer,
            tokens and trained_tokens; if not, field and reason.

        Raises:
            UsageError: a file cannot be read.
        """
        for path in files:
            if not path.name.endswith(SUFFIXES):
                self._say(f"[yellow]{escape(str(path))}[/]: the spool takes only {', '.join(SUFFIXES)} files")
            yield from self._lines(path, self._read(path))

    def _read(self, path: Path) -> Iterator[GoodLine | BadLine]:
        try:
            yield from read_lines(path, self.config.spool.max_line_bytes)
        except (DamagedFileError, OSError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error

    def sum_up(self) -> None:
        """The last line: how many lines are good."""
        style = "green" if not self.bad else "red"
        doubt = f", [yellow]{self.doubtful} with a warning[/]" if self.doubtful else ""
        self._say(
            f"[{style}]{self.good} of {counted(self.good + self.bad, 'line')} will be trained[/]{doubt}"
        )

    def _lines(self, path: Path, lines: Iterable[GoodLine | BadLine]) -> Iterator[Record]:
        for line in lines:
            record: Record = {"file": str(path), "line": line.line_no}
            where = f"{path.name}:{line.line_no}"
            if isinstance(line, BadLine):
                yield record | self._refused(where, line.field, line.reason)
                continue
            try:
                parts = self._encode(line.example)
                warnings = self._warnings(line.example, where)
            except ExampleError as error:
                yield record | self._refused(where, error.field, error.reason)
                continue
            yield record | self._accepted(where, line.example, parts, warnings)

    def _encode(self, example: Example) -> list[Encoded]:
        if self.tokenizer is None:
            return []
        training = self.config.training
        return encode(
            example,
            self.tokenizer,
            max_tokens=training.max_tokens,
            max_trained=training.most_trained,
            context=training.context,
            freezes=self.freezes,
            context_length=self.context_length,
            train_on=training.train_on,
            stops=self.stops,
        )

    def _warnings(self, example: Example, where: str) -> list[Caution]:
        found = cautions(example, self.tokenizer, self.config.training.train_on) if self.tokenizer else []
        content = repr((example.messages, example.tools, example.prompt, example.completion, example.text))
        digest = hashlib.sha256(content.encode()).digest()[:16]
        if digest in self._seen:
            found.append(Caution("duplicate", f"the same as {self._seen[digest]}"))
        self._seen.setdefault(digest, where)
        return found

    def _refused(self, where: str, name: str | None, reason: str) -> Record:
        self.bad += 1
        what = f"{name}: {reason}" if name else reason
        self._say(f"[red]err[/] {escape(where)} {escape(what)}")
        return {"ok": False, "field": name, "reason": reason}

    def _accepted(
        self, where: str, example: Example, parts: list[Encoded], warnings: list[Caution]
    ) -> Record:
        self.good += 1
        self.doubtful += bool(warnings)
        form = "chat" if example.messages else "completion" if example.completion else "text"
        record: Record = {"ok": True, "id": example.id, "form": form}
        facts = [example.id] if example.id else []
        if parts:
            counts = {
                "tokens": sum(len(part.ids) for part in parts),
                "trained_tokens": sum(part.trained_tokens for part in parts),
            }
            record |= counts
            facts.append(f"{counts['trained_tokens']} of {counted(counts['tokens'], 'token')} trained")
        facts += _settings(example, len(parts))
        if self.tokens:
            record["sequences"] = [{"ids": part.ids, "trained": part.trained} for part in parts]
        record["warnings"] = [warning._asdict() for warning in warnings]
        if warnings or not self.problems_only:
            self._say(f"[green]ok [/] {escape(where)} {escape(', '.join(facts))}")
        if self.tokenizer is not None and not self.problems_only:
            shown = Shown(self.tokens, self.console.color_system is not None)
            for number, part in enumerate(parts, 1):
                if len(parts) > 1:
                    self._say(f"    sequence {number}:")
                text = show(part, self.tokenizer, shown)
                for line in text.wrap(self.console, max(self.console.width - 4, 20)):
                    self.console.print(Text("    ") + line, soft_wrap=True)
        for warning in warnings:
            self._say(f"    [yellow]warning {warning.code}[/]: {escape(warning.text)}")
        return record

    def _say(self, text: str) -> None:
        self.console.print(plain(text), highlight=False, soft_wrap=True)


def _settings(example: Example, sequences: int) -> list[str]:
    """What this line says differently from the configuration."""
    said = []
    if example.weight < 0:
        said.append(f"weight {example.weight:g}: unlearns")
    elif example.weight != 1:
        said.append(f"weight {example.weight:g}")
    if sequences > 1:
        why = "it is long" if example.text else "the chat template changes earlier turns"
        said.append(f"{sequences} sequences, because {why}")
    for name in ("train_on", "context", "passes", "until_loss", "priority"):
        value = getattr(example, name)
        if value:
            said.append(f"{name} {value}")
    return said
