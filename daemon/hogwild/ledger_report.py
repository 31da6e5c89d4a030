"""What the report asks of the ledger: losses by file, and over time."""

from hogwild.ledger import Ledger
from hogwild.ledger_schema import OWN

_POINTS = 300  # of a curve


def losses_by_file(ledger: Ledger, limit: int) -> list[tuple[str, int, float | None, float | None]]:
    """(name, examples, mean loss before the first pass, mean loss at the last), of the newest files, oldest first.

    The last is the one after the last pass where that was measured, and the one before it elsewhere.
    """
    own = f"FROM passes p WHERE p.example_id = e.example_id AND NOT undone AND {OWN} ORDER BY pass_id"
    with ledger._db.read() as db:
        rows = db.execute(
            f"SELECT f.name, count(*), avg((SELECT loss_before {own} LIMIT 1)), avg(e.last_loss)"
            " FROM files f JOIN examples e USING (file_id) WHERE e.passes_done > 0 AND f.file_id IN"
            " (SELECT DISTINCT file_id FROM examples WHERE passes_done > 0 ORDER BY file_id DESC LIMIT ?)"
            " GROUP BY f.file_id ORDER BY f.file_id",
            (limit,),
        ).fetchall()
    return [(row[0], int(row[1]), row[2], row[3]) for row in rows]


def losses_over_steps(ledger: Ledger) -> dict[str, list[tuple[float, float | None]]]:
    """ "new" and "replayed" -> (step, mean loss before the update), at most a few hundred points each."""
    found = {}
    with ledger._db.read() as db:
        last = db.execute("SELECT coalesce(max(step), 0) FROM passes WHERE NOT undone").fetchone()[0]
        width = max(last // _POINTS, 1)
        for name, condition in (("new", OWN), ("replayed", "replay")):
            found[name] = [
                (float(step), loss)
                for step, loss in db.execute(
                    f"SELECT avg(step), avg(loss_before) FROM passes WHERE NOT undone AND {condition}"
                    " GROUP BY step / ? ORDER BY 1",
                    (width,),
                )
            ]
    return {name: points for name, points in found.items() if points}


def range_of_training(ledger: Ledger) -> tuple[str, str, int, int]:
    """(first pass at, last pass at, newest step, trained tokens), of what counts; "" where there is none."""
    with ledger._db.read() as db:
        row = db.execute(
            "SELECT coalesce(min(at), ''), coalesce(max(at), ''), coalesce(max(step), 0), coalesce(sum(tokens), 0)"
            " FROM passes WHERE NOT undone"
        ).fetchone()
    return row[0], row[1], int(row[2]), int(row[3])
