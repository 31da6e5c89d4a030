"""Every example that was ever accepted, and what became of it.

    accepted --passes--> trained --checkpoint--> durable        failed: accepted, but cannot be trained
        ^___________________|________________________|          passes that a crash undid are done again
        ^________________ undone ____________________|          what a rollback undid, until `retrain`

Thread-safe. `ledger_db` says what a commit promises, `ledger_schema` documents the tables.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection

from hogwild import ledger_check
from hogwild.errors import LedgerError
from hogwild.ledger_db import NOW, Database
from hogwild.ledger_files import Files
from hogwild.ledger_guard import Guards, note_window
from hogwild.ledger_records import (
    BadLine,
    Counts,
    FileRecord,
    GoodLine,
    Growing,
    GuardName,
    NewFile,
    Outcome,
    Pass,
    Pending,
    Reset,
    State,
    Suspect,
    Trip,
    selection,
)
from hogwild.ledger_replay import Pool
from hogwild.ledger_staging import recover
from hogwild.ledger_undo import go_back, note_passes

__all__ = [
    "BadLine",
    "Counts",
    "FileRecord",
    "GoodLine",
    "Growing",
    "GuardName",
    "Ledger",
    "NewFile",
    "Outcome",
    "Pass",
    "Pending",
    "Reset",
    "State",
    "Suspect",
    "Trip",
]

PENDING_BYTES = 16 * 1024 * 1024  # of lines that `pending` holds at once, one line at least
_LATELY = 32  # passes that are looked at for each one that is wanted: the others were replayed, or undone


class Ledger(Files):
    """Opens, creates or migrates the ledger. One process may write; any number may read.

    Raises:
        LedgerError: see `ledger_db.Database`; every method raises it when SQLite or the disk fails.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._db = Database(path, readonly=readonly)
        self._readonly = readonly
        self.pool = Pool(self._db)
        self.guards = Guards(self._db)
        if not readonly:
            try:
                ledger_check.check_file(self._db)
                recover(self._db)
                ledger_check.repair(self._db)
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._readonly and self._db.is_open:
            try:
                ledger_check.note_clean(self._db)
            except LedgerError:
                pass  # the next start reads the whole file
        self._db.close()

    # --- training ----------------------------------------------------------------------------------------

    def pending(self, limit: int, exclude_ids: Collection[int] = ()) -> list[Pending]:
        """What to train next: fewest passes first, so that passes are spaced, then priority, then arrival."""
        found: list[Pending] = []
        held = 0
        with self._db.read() as db:
            rows = db.execute(
                "SELECT e.example_id, f.name, e.line_no, e.name, l.line, e.passes_done, e.passes, e.until_loss,"
                " (SELECT step FROM passes p WHERE p.pass_id = e.last_pass),"
                " (SELECT count(*) FROM strikes s WHERE s.example_id = e.example_id AND s.guard = 'crash')"
                " FROM examples e JOIN files f USING (file_id) JOIN lines l USING (example_id)"
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

    def record_passes(self, passes: Sequence[Pass]) -> list[Outcome]:
        """Notes passes *after* their update is in the weights; the order matters, see `begin_checkpoint`.

        Not fsynced: a power cut takes the weights too, and the passes are done again.
        """
        with self._db.write(fsync=False) as db:
            return [self._record(db, one) for one in passes]

    def _record(self, db: Connection, one: Pass) -> Outcome:
        # A replayed one may have been set aside by another thread since it was chosen.
        states = "'accepted', 'trained', 'durable'" + (", 'quarantined'" if one.replay else "")
        trainable = f"SELECT 1 FROM examples WHERE example_id = ? AND state IN ({states})"
        if db.execute(trainable, (one.example_id,)).fetchone() is None:
            raise LedgerError(
                f"{self.path}: example {one.example_id} cannot be trained: it failed, was undone or is unknown"
            )
        pass_id = db.execute(
            "INSERT INTO passes (example_id, at, loss_before, loss_after, tokens, step, thread, arena, replay)"
            f" VALUES (?, {NOW}, ?, ?, ?, ?, ?, ?, ?) RETURNING pass_id",
            (one.example_id, one.loss_before, one.loss_after, one.tokens, one.step, one.thread, one.arena_id,
             one.replay),
        ).fetchone()[0]  # fmt: skip
        if one.replay:
            query = "SELECT state, passes_done FROM examples WHERE example_id = ?"
            return Outcome(one.example_id, *db.execute(query, (one.example_id,)).fetchone())
        loss = one.loss_before if one.loss_after is None else one.loss_after
        row = db.execute(
            "UPDATE examples SET passes_done = passes_done + 1, last_pass = ?, last_loss = ?,"
            " state = iif(passes_done + 1 >= passes OR coalesce(? <= until_loss, 0), 'trained', 'accepted'),"
            " reason = NULL WHERE example_id = ? RETURNING state, passes_done",
            (pass_id, loss, loss, one.example_id),
        ).fetchone()
        if row[0] == "trained":
            db.execute("DELETE FROM strikes WHERE example_id = ?", (one.example_id,))
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

    def count_step_without_pass(self) -> None:
        """A step that trained nothing but texts of the model's own: `claim` begins the count anew. Not fsynced."""
        with self._db.write(fsync=False) as db:
            db.execute(
                "INSERT INTO meta VALUES ('arena_steps_without_pass', '1') ON CONFLICT DO UPDATE"
                " SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT)"
            )

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

    def interrupted_checkpoint(self, generation: int, marker: int) -> bool:
        """Is this the checkpoint that was begun last, and was it never noted as complete?"""
        with self._db.read() as db:
            begun = db.execute("SELECT value FROM meta WHERE key = 'checkpoint_begun'").fetchone()
            known = db.execute("SELECT 1 FROM checkpoints WHERE generation = ?", (generation,)).fetchone()
        return known is None and begun == (str(marker),)

    def durable_marker(self) -> int:
        """The newest complete checkpoint's marker; 0 without one. One that a rollback left does not count."""
        with self._db.read() as db:
            query = "SELECT coalesce(max(marker), 0) FROM checkpoints WHERE NOT undone"
            return int(db.execute(query).fetchone()[0])

    def has_passes_to_save(self) -> bool:
        """Does a pass count that no complete checkpoint is sure to hold?

        A step is counted when the weights are written and its passes are recorded a moment later, so a checkpoint that
        begins in between has the step, and does not vouch for them.
        """
        with self._db.read() as db:
            row = db.execute(
                "SELECT max(pass_id) FROM passes WHERE NOT undone AND pass_id > "
                "(SELECT coalesce(max(marker), 0) FROM checkpoints WHERE NOT undone)"
            ).fetchone()
        return row[0] is not None

    def reset_to_durable(self, marker: int | None = None) -> Reset:
        """Undoes every pass after the newest checkpoint, because the weights that had them are gone. Fsynced.

        Args:
            marker: of an older checkpoint to go back to (0: the model as it came).
        """
        marker = self.durable_marker() if marker is None else marker
        with self._db.write(fsync=True) as db:
            return go_back(db, marker, "accepted", "the weights that had its passes were lost")

    def roll_back(
        self, marker: int, *, retrain: bool, trip: Trip | None = None, generation: int = 0
    ) -> Reset:
        """The weights are those of an older (or abandoned) checkpoint again, on request. Fsynced.

        Examples that lose passes become "undone" and stay out until `retrain`, or with `retrain` are accepted
        again with the passes that are left. What was never trained stays accepted.

        Args:
            marker: of the checkpoint; 0: the model as it came.
            trip: a guard asks for it: examples that lose passes are quarantined, with the evidence.
            generation: of the checkpoint, for that.
        """
        with self._db.write(fsync=True) as db:
            row = db.execute(
                "SELECT coalesce('generation ' || generation, 'checkpoint ' || checkpoint_id) FROM checkpoints"
                " WHERE marker = ? ORDER BY undone, checkpoint_id DESC LIMIT 1",
                (marker,),
            ).fetchone()
            where = "the model as it came" if not marker else row[0] if row else f"pass {marker}"
            if trip is not None:
                reset = go_back(
                    db, marker, "quarantined", f"set aside by {trip.guard}: rolled back to {where}"
                )
                note_window(db, trip, generation)
                return reset
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
            where, arguments = selection("undone", example_ids, file)
            return db.execute(
                f"UPDATE examples SET state = 'accepted', reason = 'asked to be trained again' WHERE {where}",
                arguments,
            ).rowcount

    # --- the whole ---------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Asked every few seconds: it looks at each example, and not at the passes, which are many times as many."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT state, count(*), sum(passes_done) FROM examples GROUP BY state"
            ).fetchall()
            rejected, files = db.execute(
                "SELECT (SELECT count(*) FROM rejected JOIN files USING (file_id) WHERE state <> 'staging'),"
                " (SELECT count(*) FROM files WHERE state <> 'staging')"
            ).fetchone()
        states = {state: count for state, count, _ in rows}
        by_state = {
            name: states.get(name, 0) for name in ("trained", "durable", "failed", "undone", "quarantined")
        }
        return Counts(
            pending=states.get("accepted", 0),
            **by_state,
            rejected=rejected,
            files=files,
            passes=sum(done for _, _, done in rows),
        )

    def remaining(self, newest: int = 32) -> tuple[int, float | None]:
        """Passes that are still to be done, at most; and the mean loss of the `newest` ones before their update.

        Of what was trained lately, that is: None after a rollback, which may have undone millions.
        """
        with self._db.read() as db:
            left = db.execute(
                "SELECT coalesce(sum(passes - passes_done), 0) FROM examples WHERE state = 'accepted'"
            ).fetchone()[0]
            loss = db.execute(
                "SELECT avg(loss_before) FROM (SELECT loss_before FROM"
                " (SELECT loss_before, replay, undone FROM passes ORDER BY pass_id DESC LIMIT ?)"
                " WHERE NOT replay AND NOT undone LIMIT ?)",
                (_LATELY * newest, newest),
            ).fetchone()[0]
        return int(left), loss

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
        self.set_metas({key: value})

    def set_metas(self, values: Mapping[str, str]) -> None:
        """All of them or, if the process dies, none. Fsynced."""
        with self._db.write(fsync=True) as db:
            db.executemany(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                list(values.items()),
            )

    def trained_between(self, after: int, upto: int) -> dict[str, int | float | None]:
        """What the passes after one marker and up to another have done, without those undone: counts, mean losses.

        The losses are of the examples whose loss was measured after a pass of their own: before the first of them, and
        after the last. Where there is none, that before all passes, and None.
        """
        with self._db.read() as db:
            row = db.execute(_TRAINED_BETWEEN, (after, upto)).fetchone()
        return dict(zip(("examples", "passes", "loss_before", "loss_after"), row, strict=True))


_TRAINED_BETWEEN = """
WITH within AS (SELECT * FROM passes WHERE pass_id > ? AND pass_id <= ? AND NOT undone),
ends AS (
  SELECT min(pass_id) AS first, max(CASE WHEN loss_after IS NOT NULL THEN pass_id END) AS last
  FROM within WHERE NOT replay GROUP BY example_id HAVING last IS NOT NULL
)
SELECT count(DISTINCT example_id), count(*),
  coalesce((SELECT avg(loss_before) FROM passes JOIN ends ON pass_id = first), avg(loss_before)),
  (SELECT avg(loss_after) FROM passes JOIN ends ON pass_id = last)
FROM within
"""
