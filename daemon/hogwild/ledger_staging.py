"""Taking a file into the ledger in small transactions, so that trainers never wait long to record a pass.

    staged (files: staging) --the file's own row becomes "accepted", fsynced--> ours --> visible to trainers

Before that one commit the file is not ours and nothing of it counts; after it everything does.
"""

from collections.abc import Iterable, Sequence
from sqlite3 import Connection

from hogwild.ledger_db import Database
from hogwild.ledger_records import BadLine, GoodLine

BATCH_LINES = 500
BATCH_BYTES = 4 * 1024 * 1024
BATCH_UPDATES = 5000


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


def publish(db: Database, file_id: int) -> None:
    """Makes an accepted file's examples visible. After a crash, opening the ledger does the rest."""
    while True:
        with db.write(fsync=False) as connection:
            changed = connection.execute(
                "UPDATE examples SET state = 'accepted' WHERE example_id IN"
                " (SELECT example_id FROM examples WHERE file_id = ? AND state = 'staged' LIMIT ?)",
                (file_id, BATCH_UPDATES),
            ).rowcount
        if changed < BATCH_UPDATES:
            return


def discard(db: Database, file_id: int) -> None:
    """Forgets a file that was not read to its end. It is still in incoming/."""
    while True:
        with db.write(fsync=False) as connection:
            ours = connection.execute("SELECT state FROM files WHERE file_id = ?", (file_id,)).fetchone()
            if ours != ("staging",):
                return  # the commit had succeeded, whatever was raised after it
            query = "SELECT example_id FROM examples WHERE file_id = ? AND state = 'staged' LIMIT ?"
            ids = connection.execute(query, (file_id, BATCH_UPDATES)).fetchall()
            connection.executemany("DELETE FROM lines WHERE example_id = ?", ids)
            connection.executemany("DELETE FROM examples WHERE example_id = ?", ids)
            if len(ids) < BATCH_UPDATES:
                connection.execute("DELETE FROM rejected WHERE file_id = ?", (file_id,))
                connection.execute("DELETE FROM files WHERE file_id = ?", (file_id,))
                return


def recover(db: Database) -> None:
    """Finishes or forgets files that a crash left half-way."""
    with db.read() as connection:
        unread = connection.execute("SELECT file_id FROM files WHERE state = 'staging'").fetchall()
    for (file_id,) in unread:
        discard(db, file_id)
    with db.read() as connection:
        unseen = connection.execute("SELECT DISTINCT file_id FROM examples WHERE state = 'staged'").fetchall()
    for (file_id,) in unseen:
        publish(db, file_id)


def _insert(connection: Connection, file_id: int, lines: Sequence[GoodLine], passes: int) -> None:
    start = int(connection.execute("SELECT coalesce(max(example_id), 0) + 1 FROM examples").fetchone()[0])
    connection.executemany(
        "INSERT INTO examples"
        " (example_id, file_id, line_no, byte_offset, name, priority, passes, until_loss, weight, tags, state)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'staged')",
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
                line.example.weight,
                "\n".join(line.example.tags),
            )
            for example_id, line in enumerate(lines, start)
        ],
    )
    texts = [(example_id, line.raw.decode()) for example_id, line in enumerate(lines, start)]
    connection.executemany("INSERT INTO lines VALUES (?, ?)", texts)
