"""docs/ledger.md against a ledger that has seen everything: its queries run, its states are the schema's."""

import re
import sqlite3
from pathlib import Path

import pytest

from hogwild.ledger import BadLine, Ledger, Trip
from test_ledger import checkpoint, drop, good, one_pass

TEXT = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def shell(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        lines = [good(f"line {i}", i, **({"id": '"ada-1"'} if i == 7 else {})) for i in range(1, 9)]
        drop(ledger, *lines, BadLine(9, 400, "txt", "unknown field", "{}"), passes=1)
        for example_id in (7, 1):
            one_pass(ledger, example_id)
        marker = checkpoint(ledger, 1)
        one_pass(ledger, 2)
        checkpoint(ledger, 2, parent=1)
        ledger.roll_back(marker, retrain=False)
        ledger.set_failed(8, "too long", "text")
        ledger.guards.set_aside(
            6, Trip("loss", 3, {"strikes": 3}), "its loss is not finite", {"losses": [None]}
        )
        drop(ledger, good("more", 10), name="b.jsonl", continues=1, size=9)
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as shell:  # while the daemon has it open
            yield shell


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_a_query_of_the_documentation_finds_something(shell, query):
    rows = shell.execute(query).fetchall()
    assert rows, query
    assert any(value is not None for value in rows[0])


def test_there_are_queries():
    assert len(QUERIES) >= 8


def test_the_documented_states_are_those_of_the_schema(shell):
    schema = shell.execute("SELECT sql FROM sqlite_schema WHERE name = 'examples'").fetchone()[0]
    of_schema = set(re.findall(r"^\s+'(\w+)'", schema, re.MULTILINE))
    assert of_schema == set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))


def test_a_copy_can_be_made_while_it_is_in_use(shell, tmp_path):
    with sqlite3.connect(tmp_path / "copy") as copy:
        shell.backup(copy)
    with Ledger(tmp_path / "copy") as ledger:
        assert ledger.counts().undone == 1
