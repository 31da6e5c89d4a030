"""What guards have stopped, what they set aside and why; and measurements over time."""

import json
from collections.abc import Mapping, Sequence
from sqlite3 import Connection
from typing import Any

from hogwild import clock
from hogwild.ledger_db import NOW, Database
from hogwild.ledger_records import Suspect, Trip, selection
from hogwild.ledger_schema import OWN

KEPT_DAYS = 90  # of measurements
_LAST = 3  # passes whose losses are looked at
_SHOWN = 20  # losses that are kept as evidence


class Guards:
    """The tables `strikes`, `trips`, `evidence` and `series`."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def strike(
        self, guard: str, about: Mapping[str, object], example_ids: Sequence[int], *, times: int = 1
    ) -> None:
        """Something speaks against each of these examples. Not fsynced: what a power cut forgets is noted again.

        Args:
            times: it weighs as much as this many strikes.
        """
        with self._db.write(fsync=False) as db:
            db.executemany(
                "INSERT INTO strikes (example_id, guard, about) SELECT value, ?, ? FROM json_each(?)",
                [(guard, json.dumps(about), json.dumps(example_ids))] * times,
            )

    def survived(self, example_ids: Sequence[int]) -> None:
        """A step with these came to its end: what ended the daemon before was not them. Not fsynced."""
        with self._db.write(fsync=False) as db:
            db.execute(
                "DELETE FROM strikes WHERE guard = 'crash' AND example_id IN (SELECT value FROM json_each(?))",
                (json.dumps(example_ids),),
            )

    def strikes(self, example_id: int) -> list[dict[str, Any]]:
        """What speaks against it, the oldest first."""
        with self._db.read() as db:
            query = "SELECT guard, about FROM strikes WHERE example_id = ? ORDER BY strike_id"
            rows = db.execute(query, (example_id,)).fetchall()
        return [{"guard": guard, **json.loads(about)} for guard, about in rows]

    def deadly(self, crashes: int) -> list[tuple[int, dict[str, object]]]:
        """Examples in whose steps the daemon has ended so often: (example_id, as the log names it). To be asked before
        anything is trained."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT example_id, coalesce(e.name, example_id), f.name, line_no FROM strikes"
                " JOIN examples e USING (example_id) JOIN files f USING (file_id)"
                " WHERE guard = 'crash' AND e.state IN ('accepted', 'trained', 'durable')"
                " GROUP BY example_id HAVING count(*) >= ? ORDER BY example_id",
                (crashes,),
            ).fetchall()
        return [(row[0], {"id": str(row[1]), "file": row[2], "line": row[3]}) for row in rows]

    def set_aside(self, example_id: int, trip: Trip, reason: str, evidence: Mapping[str, object]) -> None:
        """Quarantines one example. Its file's errors are due to be written anew, see `errors_due`. Fsynced."""
        with self._db.write(fsync=True) as db:
            trip_id = note_trip(db, trip, None)
            db.execute(
                "INSERT INTO evidence SELECT ?, example_id, last_pass, ? FROM examples WHERE example_id = ?",
                (trip_id, json.dumps(evidence), example_id),
            )
            db.execute(
                "UPDATE examples SET state = 'quarantined', reason = ? WHERE example_id = ?",
                (reason, example_id),
            )
            db.execute("DELETE FROM strikes WHERE example_id = ?", (example_id,))
            _errors_are_due(db, trip_id)

    def rest_of_files(self, trips: int, reason: str) -> dict[str, int]:
        """Quarantines what is still to be trained of files whose examples were in the window of the newest trip of
        the probes and in those of at least `trips` in all. Returns how many examples of which file. Fsynced."""
        with self._db.write(fsync=True) as db:
            newest = db.execute("SELECT max(trip_id) FROM trips WHERE guard = 'probes'").fetchone()[0]
            files = db.execute(
                "SELECT f.file_id, f.name FROM evidence v JOIN examples e USING (example_id)"
                " JOIN files f USING (file_id) JOIN trips t USING (trip_id) WHERE t.guard = 'probes'"
                " GROUP BY f.file_id HAVING count(DISTINCT t.trip_id) >= ? AND max(t.trip_id) = ?",
                (trips, newest),
            ).fetchall()
            found: dict[str, int] = {}
            for file_id, name in files:
                db.execute(
                    'INSERT OR IGNORE INTO evidence SELECT ?, example_id, last_pass, \'{"by": "its file"}\''
                    " FROM examples WHERE file_id = ? AND state = 'accepted'",
                    (newest, file_id),
                )
                count = db.execute(
                    "UPDATE examples SET state = 'quarantined', reason = ?"
                    " WHERE file_id = ? AND state = 'accepted'",
                    (reason, file_id),
                ).rowcount
                if count:
                    found[name] = found.get(name, 0) + count
            if found:
                _errors_are_due(db, newest)
            return found

    def release(self, example_ids: Sequence[int] | None = None, *, file: str | None = None) -> int:
        """Accepts quarantined examples again, with the passes that are left. Returns how many. Fsynced.

        Args:
            example_ids: only these.
            file: only those of files that were dropped under this name.
        """
        where, arguments = selection("quarantined", example_ids, file)
        with self._db.write(fsync=True) as db:
            db.execute(
                "UPDATE files SET errors_due = errors_due + 1"
                f" WHERE file_id IN (SELECT file_id FROM examples WHERE {where})",
                arguments,
            )
            return db.execute(
                f"UPDATE examples SET state = 'accepted', reason = 'let out of quarantine' WHERE {where}",
                arguments,
            ).rowcount

    def suspects(self, limit: int = -1) -> list[Suspect]:
        """What is in quarantine, the newest first, with the newest evidence; all of it, unless there is a limit."""
        own = f"FROM passes p WHERE p.example_id = e.example_id AND {OWN} ORDER BY pass_id"
        with self._db.read() as db:
            rows = db.execute(
                "SELECT e.example_id, f.name, e.line_no, e.name, t.guard, t.at, coalesce(e.reason, ''), v.about,"
                f" t.step, t.about, (SELECT loss_before {own} LIMIT 1),"
                f" (SELECT coalesce(loss_after, loss_before) {own} DESC LIMIT 1)"
                " FROM examples e JOIN files f USING (file_id) JOIN evidence v USING (example_id)"
                " JOIN trips t USING (trip_id) WHERE e.state = 'quarantined' AND t.trip_id ="
                " (SELECT max(trip_id) FROM evidence w WHERE w.example_id = e.example_id)"
                " ORDER BY t.trip_id DESC, e.example_id LIMIT ?",
                (limit,),
            )
            return [
                Suspect(*(*row[:7], json.loads(row[7]), row[8], json.loads(row[9]), *row[10:]))
                for row in rows
            ]

    def losses(self, example_id: int) -> list[float | None]:
        """Before each own pass since it was last in quarantine, nats a token: the first, and the last three."""
        counts = (
            "FROM passes WHERE example_id = ?1 AND NOT undone AND " + OWN + " AND pass_id >"
            " coalesce((SELECT max(after_pass) FROM evidence WHERE example_id = ?1), 0) ORDER BY pass_id"
        )
        with self._db.read() as db:
            query = f"SELECT pass_id, loss_before {counts} DESC LIMIT {_LAST}"
            last = db.execute(query, (example_id,)).fetchall()[::-1]
            if len(last) < _LAST:
                return [row[1] for row in last]
            first = db.execute(f"SELECT pass_id, loss_before {counts} LIMIT 1", (example_id,)).fetchone()
        return [row[1] for row in ([] if first == last[0] else [first]) + last]

    def trips(self) -> dict[str, int]:
        """How often each guard has stopped something, ever."""
        with self._db.read() as db:
            return dict(db.execute("SELECT guard, count(*) FROM trips GROUP BY guard"))

    def newest_trips(self, limit: int = 20) -> list[dict[str, object]]:
        """The newest first: at, guard, step, generation, about, set_aside (how many examples)."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT at, guard, step, generation, about,"
                " (SELECT count(*) FROM evidence v WHERE v.trip_id = t.trip_id) FROM trips t"
                " ORDER BY trip_id DESC LIMIT ?",
                (limit,),
            ).fetchall()
        names = ("at", "guard", "step", "generation", "about", "set_aside")
        return [{**dict(zip(names, row, strict=True)), "about": json.loads(row[4])} for row in rows]

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """One measurement of each name, now. Not fsynced."""
        with self._db.write(fsync=False) as db:
            for name, value in values.items():
                db.execute(
                    f"INSERT INTO series VALUES ({NOW}, ?, ?, ?)", (name, step, value)
                )  # NaN is stored as NULL
                db.execute(
                    "DELETE FROM series WHERE name = ? AND at < strftime('%Y-%m-%dT%H:%M:%fZ', ?, 'unixepoch', ?)",
                    (name, clock.now(), f"-{KEPT_DAYS} days"),
                )

    def series(self, prefix: str) -> dict[str, list[tuple[str, int, float | None]]]:
        """Measurements whose name begins so, oldest first: name -> (at, step, value)."""
        found: dict[str, list[tuple[str, int, float | None]]] = {}
        with self._db.read() as db:
            query = "SELECT name, at, step, value FROM series WHERE name GLOB ? || '*' ORDER BY at"
            for name, *point in db.execute(query, (prefix,)):
                found.setdefault(name, []).append(tuple(point))
        return found


def note_trip(db: Connection, trip: Trip, generation: int | None) -> int:
    """Inside a transaction; returns its number."""
    row = db.execute(
        f"INSERT INTO trips (at, guard, step, generation, about) VALUES ({NOW}, ?, ?, ?, ?) RETURNING trip_id",
        (trip.guard, trip.step, generation, json.dumps(trip.about)),
    ).fetchone()
    return int(row[0])


def note_window(db: Connection, trip: Trip, generation: int) -> None:
    """Inside the transaction that has gone back (`ledger_undo`): evidence against every example that it quarantined.

    Done again after a crash, it finds nothing that has changed, and notes nothing.
    """
    if not db.execute("SELECT 1 FROM touched WHERE becomes = 'quarantined' AND lost LIMIT 1").fetchone():
        return
    trip_id = note_trip(db, trip, generation)
    db.execute(
        "INSERT INTO evidence SELECT ?1, t.example_id, e.last_pass, json_object('passes',"
        f" (SELECT count(*) FROM passes p JOIN changed USING (pass_id) WHERE p.example_id = t.example_id AND {OWN}),"
        " 'losses', (SELECT json_group_array(round(loss_before, 4)) FROM (SELECT loss_before FROM passes p"
        f"   JOIN changed USING (pass_id) WHERE p.example_id = t.example_id AND {OWN} ORDER BY pass_id LIMIT ?2)),"
        " 'steps', (SELECT json_group_array(step) FROM (SELECT step FROM passes p"
        f"   JOIN changed USING (pass_id) WHERE p.example_id = t.example_id AND {OWN} ORDER BY pass_id LIMIT ?2)))"
        " FROM touched t JOIN examples e USING (example_id) WHERE t.becomes = 'quarantined' AND t.lost",
        (trip_id, _SHOWN),
    )
    _errors_are_due(db, trip_id)


def _errors_are_due(db: Connection, trip_id: int) -> None:
    db.execute(
        "UPDATE files SET errors_due = errors_due + 1 WHERE file_id IN (SELECT e.file_id FROM examples e"
        " JOIN evidence v USING (example_id) WHERE v.trip_id = ?)",
        (trip_id,),
    )
