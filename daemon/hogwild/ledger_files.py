"""The part of the ledger that the spool talks to: files, their lines, and what of them cannot be trained."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

from hogwild.errors import AlreadyAccepted, LedgerError
from hogwild.ledger_db import NOW, Database
from hogwild.ledger_records import BadLine, FileRecord, GoodLine, Growing, NewFile
from hogwild.ledger_staging import accept_whole, discard, publish, stage

ERRORS_PAGE = 1000
EXCERPT_CHARS = 200
_COLUMNS = "file_id, name, stored_as, content_hash, bytes, content_bytes"  # of `Growing`, in order
_GROWING = f"INSERT OR REPLACE INTO growing ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"


class Files:
    """See `ledger.Ledger`."""

    path: Path
    _db: Database

    def accept_file(
        self,
        name: str,
        content_hash: str,
        lines: Iterable[GoodLine | BadLine],
        *,
        passes: int,
        size: int = 0,
        content_bytes: int = 0,
        stored_as: str | None = None,
        force: bool = False,
        continues: int | None = None,
    ) -> FileRecord:
        """Takes over a file: all of it or, if `lines` raises or the process dies, nothing. Fsynced on return.

        Lines are staged in short transactions, so a million of them need little memory and trainers go on
        recording. Good lines are kept as they were written.

        Args:
            passes: for lines that do not say.
            size: bytes on disk.
            content_bytes: decompressed.
            stored_as: the name it will have in done/ or failed/.
            force: accept it although the same content was accepted before.
            continues: the file that has grown by these lines.

        Raises:
            AlreadyAccepted: this content is in the ledger.
        """
        known = self.find_content(content_hash)
        if known and not force:
            raise AlreadyAccepted(known.file_id, known.name, known.accepted_at)
        with self._db.write(fsync=False) as db:
            file_id = db.execute(
                "INSERT INTO files"
                " (name, content_hash, bytes, content_bytes, state, forced, stored_as, moved, continues)"
                " VALUES (?, ?, ?, ?, 'staging', ?, ?, 0, ?) RETURNING file_id",
                (name, content_hash, size, content_bytes, known is not None, stored_as or name, continues),
            ).fetchone()[0]
        try:
            good = stage(self._db, file_id, lines, passes)
            with self._db.write(fsync=True) as db:
                db.execute(
                    f"UPDATE files SET state = ?, accepted_at = {NOW}, errors_due = iif(continues IS NULL, 0,"
                    " (SELECT count(*) FROM rejected r WHERE r.file_id = files.file_id)) WHERE file_id = ?",
                    ("accepted" if good else "rejected", file_id),
                )
        except BaseException:
            discard(self._db, file_id)
            raise
        publish(self._db, file_id)
        return self.file(file_id)

    def accept_files(self, files: Sequence[NewFile], *, passes: int) -> list[FileRecord | AlreadyAccepted]:
        """Takes over small files in one transaction, fsynced on return; one result for each, in order.

        Args:
            passes: for lines that do not say.
        """
        with self._db.write(fsync=True) as db:
            return accept_whole(db, files, passes)

    def find_content(self, content_hash: str) -> FileRecord | None:
        """The accepted file with this content, if there is one."""
        with self._db.read() as db:
            row = db.execute(
                "SELECT file_id FROM files WHERE content_hash = ? AND state = 'accepted' AND NOT forced",
                (content_hash,),
            ).fetchone()
        return self.file(row[0]) if row else None

    def unmoved(self) -> list[FileRecord]:
        """Files that are in the ledger but may still lie in incoming/: a crash came between."""
        with self._db.read() as db:
            ids = [
                row[0]
                for row in db.execute("SELECT file_id FROM files WHERE NOT moved AND state <> 'staging'")
            ]
        return [self.file(file_id) for file_id in ids]

    def set_moved(self, *file_ids: int, growing: Collection[Growing] = ()) -> None:
        """They have left incoming/, for good: the folders are fsynced.

        Args:
            growing: what somebody may still be writing to, see `set_growing`.
        """
        with self._db.write(fsync=False) as db:
            query = "UPDATE files SET moved = 1 WHERE file_id IN (SELECT value FROM json_each(?))"
            db.execute(query, (json.dumps(file_ids),))
            db.executemany(_GROWING, map(astuple, growing))

    def set_lost(self, file_id: int) -> None:
        """As `set_moved`, of a file that was moved before a crash: nobody knows any more who had it open."""
        with self._db.write(fsync=False) as db:
            db.execute("UPDATE files SET moved = 1 WHERE file_id = ?", (file_id,))
            db.execute(
                f"INSERT OR REPLACE INTO growing ({_COLUMNS}) SELECT {_COLUMNS} FROM files"
                " WHERE file_id = ? AND content_bytes IS NOT NULL",
                (file_id,),
            )

    def taken(self, file_id: int) -> Growing | None:
        """What a file was when it was accepted; None: a version that did not note it accepted it."""
        with self._db.read() as db:
            query = f"SELECT {_COLUMNS} FROM files WHERE file_id = ? AND content_bytes IS NOT NULL"
            row = db.execute(query, (file_id,)).fetchone()
        return Growing(*row) if row else None

    def set_growing(self, *files: Growing) -> None:
        """Somebody may still be writing to them, wherever in done/ or failed/ they are."""
        with self._db.write(fsync=False) as db:
            db.executemany(_GROWING, map(astuple, files))

    def growing(self) -> list[Growing]:
        """Files that somebody may still be writing to, oldest first."""
        with self._db.read() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM growing ORDER BY file_id").fetchall()
        return [Growing(*row) for row in rows]

    def set_grown(self, *stored_as: str) -> None:
        """Nobody writes to them any more."""
        with self._db.write(fsync=False) as db:
            query = "DELETE FROM growing WHERE stored_as IN (SELECT value FROM json_each(?))"
            db.execute(query, (json.dumps(stored_as),))

    def names_taken(self, names: Sequence[str]) -> set[str]:
        """Which of these names in done/ or failed/ belong to a file already."""
        with self._db.read() as db:
            query = "SELECT stored_as FROM files WHERE stored_as IN (SELECT value FROM json_each(?))"
            return {row[0] for row in db.execute(query, (json.dumps(names),))}

    def errors_due(self) -> list[tuple[int, str, str, int]]:
        """Files whose errors in failed/ are not all written down: (file_id, stored_as, name, how many more)."""
        with self._db.read() as db:
            return db.execute(
                "SELECT file_id, stored_as, name, errors_due FROM files WHERE errors_due > 0"
            ).fetchall()

    def bad_lines(self, stored_as: Sequence[str]) -> dict[str, int]:
        """How many lines of each of these files cannot be trained; only of those with any."""
        with self._db.read() as db:
            return dict(
                db.execute(
                    "SELECT stored_as, sum((SELECT count(*) FROM rejected r WHERE r.file_id = f.file_id) + (SELECT"
                    " count(*) FROM examples e WHERE e.file_id = f.file_id AND e.state = 'failed')) AS bad"
                    " FROM files f WHERE state <> 'staging' AND stored_as IN (SELECT value FROM json_each(?))"
                    " GROUP BY stored_as HAVING bad > 0 ORDER BY stored_as",
                    (json.dumps(stored_as),),
                )
            )

    def errors_written(self, file_id: int, count: int) -> None:
        """That many of `errors_due` are in failed/ now, durably."""
        with self._db.write(fsync=False) as db:
            db.execute("UPDATE files SET errors_due = errors_due - ? WHERE file_id = ?", (count, file_id))

    def errors(self, stored_as: str, *, after: tuple[int, int] = (0, -1)) -> list[tuple[int, int, BadLine]]:
        """What of a file is not trained, in order, in pages: bad lines, and examples that failed or were set aside.

        Args:
            after: (file_id, line_no) of the last row of the page before.

        Returns:
            (file_id, line_no, what is wrong).
        """
        with self._db.read() as db:
            ids = [
                row[0] for row in db.execute("SELECT file_id FROM files WHERE stored_as = ?", (stored_as,))
            ]
            rows: list[tuple[int, int, BadLine]] = []
            for file_id in sorted(ids):
                if file_id < after[0] or len(rows) >= ERRORS_PAGE:
                    continue
                line_no = after[1] if file_id == after[0] else -1
                found = db.execute(
                    "SELECT line_no, byte_offset, field, reason, excerpt FROM rejected"
                    " WHERE file_id = ?1 AND line_no > ?2 UNION ALL"
                    " SELECT line_no, byte_offset, field, coalesce(reason, ''), substr(line, 1, ?4)"
                    " FROM examples JOIN lines USING (example_id)"
                    " WHERE file_id = ?1 AND state IN ('failed', 'quarantined') AND line_no > ?2 ORDER BY 1 LIMIT ?3",
                    (file_id, line_no, ERRORS_PAGE - len(rows), EXCERPT_CHARS),
                )
                rows += [(file_id, row[0], BadLine(*row)) for row in found]
        return rows

    def file(self, file_id: int) -> FileRecord:
        with self._db.read() as db:
            row = db.execute(
                "SELECT file_id, name, content_hash, bytes, state, stored_as, moved, accepted_at FROM files"
                " WHERE file_id = ? AND state <> 'staging'",
                (file_id,),
            ).fetchone()
            if row is None:
                raise LedgerError(f"{self.path}: there is no file {file_id}")
            states = dict(
                db.execute(
                    "SELECT state, count(*) FROM examples WHERE file_id = ? GROUP BY state", (file_id,)
                )
            )
            rejected = db.execute("SELECT count(*) FROM rejected WHERE file_id = ?", (file_id,)).fetchone()[0]
        return FileRecord(
            file_id=row[0],
            name=row[1],
            content_hash=row[2],
            bytes=row[3],
            state=row[4],
            stored_as=row[5],
            moved=bool(row[6]),
            accepted_at=row[7],
            pending=states.get("accepted", 0),
            trained=states.get("trained", 0),
            durable=states.get("durable", 0),
            failed=states.get("failed", 0),
            rejected=rejected,
            undone=states.get("undone", 0),
            quarantined=states.get("quarantined", 0),
        )

    def files(self, limit: int = 100) -> list[FileRecord]:
        """The newest files, with their progress."""
        with self._db.read() as db:
            query = "SELECT file_id FROM files WHERE state <> 'staging' ORDER BY file_id DESC LIMIT ?"
            ids = [row[0] for row in db.execute(query, (limit,))]
        return [self.file(file_id) for file_id in ids]

    def rejected(self, file_id: int, *, after_row: int = 0, limit: int = 1000) -> list[tuple[int, BadLine]]:
        """Bad lines of a file in order, in pages: (row, line); pass the last row on to get the next page."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT rowid, line_no, byte_offset, field, reason, excerpt FROM rejected"
                " WHERE file_id = ? AND rowid > ? ORDER BY rowid LIMIT ?",
                (file_id, after_row, limit),
            ).fetchall()
        return [(row[0], BadLine(*row[1:])) for row in rows]
