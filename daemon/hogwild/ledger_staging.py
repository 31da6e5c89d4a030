"""Taking a file into the ledger in small transactions, so that trainers never wait long to record a pass.

    staged (files: staging) --the file's own row becomes "accepted", fsynced--> ours --> visible to trainers

Before that one commit the file is not ours and nothing of it counts; after it everything does.
"""

from collections.abc import Iterable, Sequence
from sqlite3 import Connection

import orjson

from hogwild.errors import AlreadyAccepted
from hogwild.ledger_db import Database
from hogwild.ledger_records import BadLine, FileRecord, GoodLine, NewFile

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
            _insert(connection, [(file_id, line) for line in good], passes, "staged")
            _insert_bad(connection, [(file_id, line) for line in bad])
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


def accept_whole(
    connection: Connection, files: Sequence[NewFile], passes: int
) -> list[FileRecord | AlreadyAccepted]:
    """Takes small files in the caller's transaction, without staging: all of it appears at its commit."""
    known = {
        row[0]: AlreadyAccepted(*row[1:])
        for row in connection.execute(
            "SELECT content_hash, file_id, name, accepted_at FROM files WHERE state = 'accepted' AND NOT forced"
            " AND content_hash IN (SELECT value FROM json_each(?))",
            (orjson.dumps([file.content_hash for file in files]).decode(),),
        )
    }
    now, first = connection.execute(
        "SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), coalesce(max(file_id), 0) + 1 FROM files"
    ).fetchone()
    file_id = first
    results: list[FileRecord | AlreadyAccepted] = []
    rows: list[Sequence[object]] = []
    good: list[tuple[int, GoodLine]] = []
    bad: list[tuple[int, BadLine]] = []
    for file in files:
        same = known.get(file.content_hash)
        if same is not None and not file.force:
            results.append(same)
            continue
        before = len(good)
        for line in file.lines:
            if isinstance(line, GoodLine):
                good.append((file_id, line))
            else:
                bad.append((file_id, line))
        examples = len(good) - before
        record = FileRecord(
            file_id=file_id,
            name=file.name,
            content_hash=file.content_hash,
            bytes=file.bytes,
            state="accepted" if examples else "rejected",
            stored_as=file.stored_as,
            moved=False,
            accepted_at=now,
            pending=examples,
            trained=0,
            durable=0,
            failed=0,
            rejected=len(file.lines) - examples,
        )
        rows.append((file_id, file.name, file.content_hash, file.bytes, file.content_bytes,
                     same is not None, file.stored_as))  # fmt: skip
        if examples and same is None:
            known[file.content_hash] = AlreadyAccepted(file_id, file.name, now)
        results.append(record)
        file_id += 1
    _insert_rows(
        connection,
        "files (file_id, name, content_hash, bytes, content_bytes, forced, stored_as, state, moved)",
        rows,
        "'staging', 0",
    )
    _insert(connection, good, passes, "accepted")
    _insert_bad(connection, bad)
    connection.execute(
        "UPDATE files SET accepted_at = ?, state = iif(EXISTS (SELECT 1 FROM examples e"
        " WHERE e.file_id = files.file_id), 'accepted', 'rejected') WHERE file_id >= ?",
        (now, first),
    )
    return results


def _insert(connection: Connection, lines: Sequence[tuple[int, GoodLine]], passes: int, state: str) -> None:
    start = int(connection.execute("SELECT coalesce(max(example_id), 0) + 1 FROM examples").fetchone()[0])
    _insert_rows(
        connection,
        "examples (example_id, file_id, line_no, byte_offset, name, priority, passes, until_loss, state)",
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
            for example_id, (file_id, line) in enumerate(lines, start)
        ],
        f"'{state}'",
    )
    texts = [(example_id, line.raw.decode()) for example_id, (_, line) in enumerate(lines, start)]
    _insert_rows(connection, "lines", texts)


def _insert_bad(connection: Connection, lines: Sequence[tuple[int, BadLine]]) -> None:
    _insert_rows(connection, "rejected", [(file_id, *line) for file_id, line in lines])


def _insert_rows(
    connection: Connection, into: str, rows: Sequence[Sequence[object]], constants: str = ""
) -> None:
    """Inserts rows with one statement that runs once.

    Stepping through a statement for every row gives up the interpreter lock every time, and busy trainer
    threads take it: `executemany` is several times slower then.
    """
    if not rows:
        return
    count = len(rows[0])
    document = orjson.dumps(rows)
    more = f", {constants}" if constants else ""
    if b"\\u0000" in document:  # SQLite's JSON functions cut strings at a NUL
        connection.executemany(f"INSERT INTO {into} VALUES ({', '.join('?' * count)}{more})", rows)
        return
    columns = ", ".join(f"value ->> {index}" for index in range(count))
    connection.execute(f"INSERT INTO {into} SELECT {columns}{more} FROM json_each(?)", (document.decode(),))
