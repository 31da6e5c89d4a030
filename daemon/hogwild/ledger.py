"""Every example that was ever accepted, and what became of it.

    accepted --passes--> trained --checkpoint--> durable        failed: accepted, but cannot be trained
        ^___________________|________________________|          passes that a crash undid are done again
        ^________________ undone ____________________|          what a rollback undid, until `retrain`

Thread-safe. `ledger_db` says what a commit promises, `ledger_schema` documents the tables.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from sqlite3 import Connection

from hogwild.errors import AlreadyAccepted, LedgerError
from hogwild.ledger_db import Database
from hogwild.ledger_records import (
    BadLine,
    Counts,
    FileRecord,
    GoodLine,
    Growing,
    NewFile,
    Outcome,
    Pass,
    Pending,
    Reset,
    State,
)
from hogwild.ledger_staging import accept_whole, discard, publish, recover, stage
from hogwild.ledger_undo import go_back, note_passes

__all__ = [
    "BadLine",
    "Counts",
    "FileRecord",
    "GoodLine",
    "Growing",
    "Ledger",
    "NewFile",
    "Outcome",
    "Pass",
    "Pending",
    "Reset",
    "State",
]

PENDING_BYTES = 16 * 1024 * 1024  # of lines that `pending` holds at once, one line at least
ERRORS_PAGE = 1000
EXCERPT_CHARS = 200
NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"


class Ledger:
    """Opens, creates or migrates the ledger. One process may write; any number may read.

    Raises:
        LedgerError: see `ledger_db.Database`; every method raises it when SQLite or the disk fails.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._db = Database(path, readonly=readonly)
        if not readonly:
            recover(self._db)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    # --- files -------------------------------------------------------------------------------------------

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

    def set_moved(self, *file_ids: int, may_grow: Collection[int] = ()) -> None:
        """They have left incoming/, for good: the folders are fsynced.

        Args:
            may_grow: those of them that somebody may still be writing to.
        """
        with self._db.write(fsync=False) as db:
            db.execute(
                "UPDATE files SET moved = 1, may_grow = file_id IN (SELECT value FROM json_each(?))"
                " WHERE file_id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(may_grow)), json.dumps(file_ids)),
            )

    def growing(self) -> list[Growing]:
        """Files that somebody may still be writing to, oldest first."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT file_id, name, state, stored_as, content_hash, bytes, content_bytes FROM files"
                " WHERE may_grow AND state <> 'staging' ORDER BY file_id"
            ).fetchall()
        return [Growing(*row) for row in rows]

    def set_grown(self, *file_ids: int) -> None:
        """Nobody writes to them any more, or what came after them has been taken."""
        with self._db.write(fsync=False) as db:
            db.execute(
                "UPDATE files SET may_grow = 0 WHERE file_id IN (SELECT value FROM json_each(?))",
                (json.dumps(file_ids),),
            )

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

    def errors_written(self, file_id: int, count: int) -> None:
        """That many of `errors_due` are in failed/ now, durably."""
        with self._db.write(fsync=False) as db:
            db.execute("UPDATE files SET errors_due = errors_due - ? WHERE file_id = ?", (count, file_id))

    def errors(self, stored_as: str, *, after: tuple[int, int] = (0, -1)) -> list[tuple[int, int, BadLine]]:
        """What of a file cannot be trained, in order, in pages: bad lines, and examples that failed.

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
                    " WHERE file_id = ?1 AND state = 'failed' AND line_no > ?2 ORDER BY 1 LIMIT ?3",
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

    # --- training ----------------------------------------------------------------------------------------

    def pending(self, limit: int, exclude_ids: Collection[int] = ()) -> list[Pending]:
        """What to train next: fewest passes first, so that passes are spaced, then priority, then arrival."""
        found: list[Pending] = []
        held = 0
        with self._db.read() as db:
            rows = db.execute(
                "SELECT e.example_id, f.name, e.line_no, e.name, l.line, e.passes_done, e.passes,"
                " e.until_loss FROM examples e JOIN files f USING (file_id) JOIN lines l USING (example_id)"
                " WHERE e.state = 'accepted' ORDER BY e.passes_done, e.priority DESC, e.example_id LIMIT ?",
                (limit + len(exclude_ids),),
            )
            for row in rows:
                if row[0] not in exclude_ids:
                    found.append(Pending(*row))
                    held += len(row[4])
                if len(found) >= limit or held >= PENDING_BYTES:
                    break
        return found

    def record_pass(self, one: Pass) -> Outcome:
        """See `record_passes`."""
        return self.record_passes([one])[0]

    def record_passes(self, passes: Sequence[Pass]) -> list[Outcome]:
        """Notes passes *after* their update is in the weights; the order matters, see `begin_checkpoint`.

        Not fsynced: a power cut takes the weights too, and the passes are done again.
        """
        with self._db.write(fsync=False) as db:
            return [self._record(db, one) for one in passes]

    def _record(self, db: Connection, one: Pass) -> Outcome:
        trainable = (
            "SELECT 1 FROM examples WHERE example_id = ? AND state IN ('accepted', 'trained', 'durable')"
        )
        if db.execute(trainable, (one.example_id,)).fetchone() is None:
            raise LedgerError(
                f"{self.path}: example {one.example_id} cannot be trained: it failed, was undone or is unknown"
            )
        pass_id = db.execute(
            "INSERT INTO passes (example_id, at, loss_before, loss_after, tokens, step, thread, arena)"
            f" VALUES (?, {NOW}, ?, ?, ?, ?, ?, ?) RETURNING pass_id",
            (one.example_id, one.loss_before, one.loss_after, one.tokens, one.step, one.thread, one.arena_id),
        ).fetchone()[0]
        loss = one.loss_before if one.loss_after is None else one.loss_after
        row = db.execute(
            "UPDATE examples SET passes_done = passes_done + 1, last_pass = ?, last_loss = ?,"
            " state = iif(passes_done + 1 >= passes OR coalesce(? <= until_loss, 0), 'trained', 'accepted'),"
            " reason = NULL WHERE example_id = ? RETURNING state, passes_done",
            (pass_id, loss, loss, one.example_id),
        ).fetchone()
        return Outcome(one.example_id, *row)

    def set_failed(self, example_id: int, reason: str, field: str | None = None) -> None:
        """Sets an example aside that cannot be trained, such as one that is too long once tokenised.

        Its file's errors are due to be written anew, see `errors_due`.
        """
        with self._db.write(fsync=False) as db:
            db.execute(
                "UPDATE examples SET state = 'failed', reason = ?, field = ? WHERE example_id = ?",
                (reason, field, example_id),
            )
            db.execute(
                "UPDATE files SET errors_due = errors_due + 1"
                " WHERE file_id = (SELECT file_id FROM examples WHERE example_id = ?)",
                (example_id,),
            )

    def newest_pass(self) -> int:
        """Number of the newest pass that was ever recorded, undone ones included; 0 without one."""
        with self._db.read() as db:
            return int(db.execute("SELECT coalesce(max(pass_id), 0) FROM passes").fetchone()[0])

    def steps_recorded(self, arena_id: str, after_pass: int) -> int:
        """How many different steps of that arena have a pass recorded, among passes after number `after_pass`."""
        with self._db.read() as db:
            query = "SELECT count(DISTINCT step) FROM passes WHERE pass_id > ? AND arena = ?"
            return int(db.execute(query, (after_pass, arena_id)).fetchone()[0])

    # --- checkpoints -------------------------------------------------------------------------------------

    def begin_checkpoint(self) -> int:
        """Called *before* the weights are read. Returns the marker: the newest pass surely in them.

        Fsynced, so that no power cut can leave a checkpoint on disk that holds passes the ledger has forgotten (their
        numbers would be given again, to passes that it does not hold).
        """
        with self._db.write(fsync=True) as db:
            row = db.execute(
                "SELECT pass_id FROM passes WHERE NOT undone ORDER BY pass_id DESC LIMIT 1"
            ).fetchone()
            marker = int(row[0]) if row else 0
            db.execute(
                "INSERT INTO meta VALUES ('checkpoint_begun', ?)"
                " ON CONFLICT DO UPDATE SET value = excluded.value",
                (str(marker),),
            )
        return marker

    def complete_checkpoint(
        self, marker: int, step: int, path: str, *, generation: int | None = None, parent: int | None = None
    ) -> int:
        """Called when the checkpoint is on disk. Returns how many examples became durable. Fsynced.

        Args:
            generation: its number in the history.
            parent: the generation that its weights descend from.
        """
        with self._db.write(fsync=True) as db:
            (checkpoint_id,) = db.execute(
                "INSERT INTO checkpoints (marker, step, path, completed_at, generation, parent)"
                f" VALUES (?, ?, ?, {NOW}, ?, ?) RETURNING checkpoint_id",
                (marker, step, path, generation, parent),
            ).fetchone()
            note_passes(db, checkpoint_id, marker)
            return db.execute(
                "UPDATE examples SET state = 'durable' WHERE state = 'trained' AND last_pass <= ?", (marker,)
            ).rowcount

    def durable_marker(self) -> int:
        """The newest complete checkpoint's marker; 0 without one. One that a rollback left does not count."""
        with self._db.read() as db:
            query = "SELECT coalesce(max(marker), 0) FROM checkpoints WHERE NOT undone"
            return int(db.execute(query).fetchone()[0])

    def reset_to_durable(self, marker: int | None = None) -> Reset:
        """Undoes every pass after the newest checkpoint, because the weights that had them are gone. Fsynced.

        Args:
            marker: of an older checkpoint to go back to (0: the model as it came).
        """
        marker = self.durable_marker() if marker is None else marker
        with self._db.write(fsync=True) as db:
            return go_back(db, marker, "accepted", "the weights that had its passes were lost")

    def roll_back(self, marker: int, *, retrain: bool) -> Reset:
        """The weights are those of an older (or abandoned) checkpoint again, on request. Fsynced.

        Examples that lose passes become "undone" and stay out until `retrain`, or with `retrain` are accepted
        again with the passes that are left. What was never trained stays accepted.

        Args:
            marker: of the checkpoint; 0: the model as it came.
        """
        with self._db.write(fsync=True) as db:
            row = db.execute(
                "SELECT coalesce('generation ' || generation, 'checkpoint ' || checkpoint_id) FROM checkpoints"
                " WHERE marker = ? ORDER BY undone, checkpoint_id DESC LIMIT 1",
                (marker,),
            ).fetchone()
            where = "the model as it came" if not marker else row[0] if row else f"pass {marker}"
            if retrain:
                return go_back(db, marker, "accepted", f"rolled back to {where}, to be trained again")
            return go_back(db, marker, "undone", f"rolled back to {where}")

    def retrain(self, example_ids: Sequence[int] | None = None, *, file: str | None = None) -> int:
        """Accepts undone examples again, with the passes that are left. Returns how many. Fsynced.

        Args:
            example_ids: only these.
            file: only those of files that were dropped under this name.
        """
        with self._db.write(fsync=True) as db:
            chosen, arguments = ["state = 'undone'"], []
            if example_ids is not None:
                chosen.append("example_id IN (SELECT value FROM json_each(?))")
                arguments.append(json.dumps(list(example_ids)))
            if file is not None:
                chosen.append("file_id IN (SELECT file_id FROM files WHERE name = ?)")
                arguments.append(file)
            return db.execute(
                "UPDATE examples SET state = 'accepted', reason = 'asked to be trained again'"
                f" WHERE {' AND '.join(chosen)}",
                arguments,
            ).rowcount

    # --- the whole ---------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        with self._db.read() as db:
            states = dict(db.execute("SELECT state, count(*) FROM examples GROUP BY state"))
            rejected, files, passes = db.execute(
                "SELECT (SELECT count(*) FROM rejected JOIN files USING (file_id) WHERE state <> 'staging'),"
                " (SELECT count(*) FROM files WHERE state <> 'staging'),"
                " (SELECT count(*) FROM passes WHERE NOT undone)"
            ).fetchone()
        by_state = {name: states.get(name, 0) for name in ("trained", "durable", "failed", "undone")}
        return Counts(
            pending=states.get("accepted", 0), **by_state, rejected=rejected, files=files, passes=passes
        )

    def is_idle(self) -> bool:
        """Nothing is left to train."""
        with self._db.read() as db:
            return db.execute("SELECT 1 FROM examples WHERE state = 'accepted' LIMIT 1").fetchone() is None

    def get_meta(self, key: str) -> str | None:
        with self._db.read() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        """Fsynced."""
        with self._db.write(fsync=True) as db:
            db.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                (key, value),
            )
