"""Taking a file into the ledger a few hundred lines at a time, unseen until the last one is in."""

from collections.abc import Iterable, Sequence
from sqlite3 import Connection

from hogwild.ledger_db import Database
from hogwild.ledger_records import BadLine, GoodLine

BATCH_LINES = 500  # of one transaction: trainers never wait long for the lock
BATCH_BYTES = 4 * 1024 * 1024


def stage(db: Database, file_id: int, lines: Iterable[GoodLine | BadLine], passes: int) -> int:
    """Writes lines in state "staged" and returns how many are good. Parsing happens outside the lock."""
    good: list[GoodLine] = []
    bad: list[BadLine] = []
    held = total = 0

    def flush() -> None:
        with db.write(fsync=False) as connection:
            _insert(connection, file_id, good, passes)
            connection.executemany(
                "INSERT INTO rejected VALUES (?, ?, ?, ?, ?, ?)", [(file_id, *line) for line in bad]
            )
        good.clear()
        bad.clear()

    for line in lines:
        if isinstance(line, GoodLine):
            good.append(line)
            total += 1
            held += len(line.raw)
        else:
            bad.append(line)
        if len(good) + len(bad) >= BATCH_LINES or held >= BATCH_BYTES:
            flush()
            held = 0
    flush()
    return total


def discard(db: Database, file_id: int) -> None:
    """Forgets a file that was not read to its end. It is still in incoming/."""
    with db.write(fsync=False) as connection:
        query = "SELECT 1 FROM files WHERE file_id = ? AND state = 'staging'"
        if connection.execute(query, (file_id,)).fetchone():
            mine = "(SELECT example_id FROM examples WHERE file_id = ?)"
            connection.execute(f"DELETE FROM lines WHERE example_id IN {mine}", (file_id,))
            for table in ("examples", "rejected", "files"):
                connection.execute(f"DELETE FROM {table} WHERE file_id = ?", (file_id,))


def _insert(connection: Connection, file_id: int, lines: Sequence[GoodLine], passes: int) -> None:
    start = int(connection.execute("SELECT coalesce(max(example_id), 0) + 1 FROM examples").fetchone()[0])
    connection.executemany(
        "INSERT INTO examples"
        " (example_id, file_id, line_no, byte_offset, name, priority, passes, until_loss, state)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'staged')",
        [
            (
                example_id,
                file_id,
                line.line_no,
                line.byte_offset,
                line.example.id,
                line.example.priority,
                line.example.passes or passes,
                line.example.until_loss,
            )
            for example_id, line in enumerate(lines, start)
        ],
    )
    texts = [(example_id, line.raw.decode()) for example_id, line in enumerate(lines, start)]
    connection.executemany("INSERT INTO lines VALUES (?, ?)", texts)
