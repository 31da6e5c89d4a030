"""What `gpu.py` found: one record for the terminal, for JSON and for Markdown, so that none of them can say more."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]
Message = tuple[Any, ...]


class WrongAnswerError(Exception):
    """A check has failed: what follows it is not measured."""


@dataclass
class Finding:
    """Something that holds or does not: a check (it must, or the run fails) or an aim (said as it is).

    Attributes:
        what: as a sentence that is true if `holds`.
        found: the figures behind it.
    """

    what: str
    holds: bool
    found: str = ""


@dataclass
class Section:
    """One part of the run.

    Attributes:
        tables: heading -> rows, each column -> figure; every row of a table has the same columns.
        left_out: what was not done, each with the reason.
        failure: why it ended early, if not by itself; "": it did not.
        seconds: wall clock, start of its process included.
    """

    name: str
    title: str
    tables: dict[str, list[Row]] = field(default_factory=dict)
    checks: list[Finding] = field(default_factory=list)
    aims: list[Finding] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    def take(self, message: Message) -> None:
        """Add what the section's process says (`Recorder`)."""
        kind, *values = message
        if kind == "row":
            self.tables.setdefault(values[0], []).append(values[1])
        elif kind in ("check", "aim"):
            (self.checks if kind == "check" else self.aims).append(Finding(*values))
        elif kind == "left out":
            self.left_out.append(values[0])
        elif kind == "failed":
            self.failure = values[0]

    @property
    def good(self) -> bool:
        return not self.failure and all(check.holds for check in self.checks)


class Recorder:
    """The section's end of it: everything is said at once, so that what a section has found outlives it.

    Attributes:
        facts: of the machine, such as its copy rate: found by the first section and known to the later ones.
    """

    def __init__(self, send: Callable[[Message], None], facts: Row, measures: bool = True) -> None:
        """`measures`: are the figures those of a device?"""
        self._send, self.facts, self._measures = send, facts, measures

    def row(self, table: str, **cells: Any) -> None:
        """One row of a table; column names may have spaces: `**{"step, ms": 1.5}`."""
        self._send(("row", table, cells))

    def check(self, what: str, holds: bool, found: str = "") -> None:
        """Raises WrongAnswerError if it does not hold."""
        self._send(("check", what, bool(holds), found))
        if not holds:
            raise WrongAnswerError(f"not so: {what}" + (f" ({found})" if found else ""))

    def aim(self, what: str, holds: bool, found: str) -> None:
        """Reached or not, the run goes on. Figures that measure nothing are not judged."""
        if self._measures:
            self._send(("aim", what, bool(holds), found))
        else:
            self.leave_out(f"whether {what}: these figures measure nothing")

    def leave_out(self, why: str) -> None:
        self._send(("left out", why))

    def fact(self, **facts: Any) -> None:
        self.facts.update(facts)
        self._send(("fact", facts))


@dataclass
class Report:
    """A whole run.

    Attributes:
        about: date, device, versions and settings.
        warning: why these figures are not those of a device; "": they are.
        to_come: titles of sections that have not run yet.
    """

    about: dict[str, str]
    warning: str
    sections: list[Section] = field(default_factory=list)
    to_come: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Did every section run and end by itself, with every check holding?"""
        return bool(self.sections) and not self.to_come and all(section.good for section in self.sections)

    def to_json(self) -> str:
        return json.dumps({"good": self.good, **asdict(self)}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """The whole of docs/gpu-results.md."""
        lines = ["# Results on a GPU", ""]
        if self.warning:
            lines += [f"**{self.warning}**", ""]
        lines += ["Written by `make gpu-check` (benchmarks/gpu.py), unedited.", ""]
        lines += [*_table([{"of this run": key, "": value} for key, value in self.about.items()]), ""]
        verdict = "Every check held." if self.good else "**Not everything held: see below.**"
        if self.to_come:
            verdict = f"**Not finished: {', '.join(self.to_come)} had not run.**"
        lines += [verdict, ""]
        for section in self.sections:
            lines += [f"## {section.title}", "", *section_lines(section)]
        return "\n".join(lines).rstrip() + "\n"


def section_lines(section: Section) -> list[str]:
    """The body of a section, as Markdown that can be read on a terminal too."""
    lines: list[str] = []
    if section.failure:
        lines += [f"**Failed: {section.failure}**", ""]
    for heading, rows in section.tables.items():
        lines += [f"{heading}:", "", *_table(rows), ""]
    for kind, findings in (("check", section.checks), ("aim", section.aims)):
        for one in findings:
            verdict = {"check": ("holds", "WRONG"), "aim": ("reached", "NOT REACHED")}[kind][not one.holds]
            lines.append(f"- {kind}, {verdict}: {one.what}" + (f" ({one.found})" if one.found else ""))
    lines += [f"- left out: {why}" for why in section.left_out]
    return [*lines, f"- {section.seconds:.0f} s", ""]


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def _cell(value: Any) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
