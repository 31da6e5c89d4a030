"""Where commands print: what is read by a person is fitted to the terminal, and nothing is cut in a pipe or a file."""

import os
import sys

from rich.console import Console

TABLE, SCREEN = 400, 140
"""Columns, where nobody says how many there are: a table takes as many as it needs, a frame takes all."""


def console(columns: int = TABLE) -> Console:
    """On stdout; with so many columns where that is no terminal and COLUMNS is not set."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else columns)


def plain(text: object) -> str:
    """Without control characters, which would move a terminal's cursor or change its colours."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) else f"\\x{ord(c):02x}"
        for c in str(text)
    )
