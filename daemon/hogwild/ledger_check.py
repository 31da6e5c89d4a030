"""What must hold in a ledger, checked whenever the daemon opens it. docs/ledger.md explains the state machine.

Counters and states follow from the passes and the checkpoints, so where they disagree they are computed anew, and
the log says so. What cannot be computed anew (text that is gone, a checkpoint that knows of more passes than the
ledger) is refused: going on would lose or double what people gave us.
"""

import time

from hogwild import log
from hogwild.errors import LedgerError
from hogwild.ledger_db import Database
from hogwild.ledger_schema import OWN

_CLEAN = "clean_shutdown"
_ADVICE = "restore ledger.sqlite from a copy, or move the state folder away to start anew"
_ENOUGH = "(passes_done >= passes OR coalesce(last_loss <= until_loss, 0))"
_MARKER = "(SELECT coalesce(max(marker), 0) FROM checkpoints WHERE NOT undone)"

REFUSED = {
    "examples are visible of a file that was not read to its end": (
        "SELECT example_id FROM examples JOIN files f USING (file_id)"
        " WHERE f.state = 'staging' AND examples.state <> 'staged'"
    ),
    "examples have lost their text": (
        "SELECT example_id FROM examples e WHERE NOT EXISTS"
        " (SELECT 1 FROM lines l WHERE l.example_id = e.example_id)"
    ),
    "examples belong to no file": (
        "SELECT example_id FROM examples e WHERE NOT EXISTS (SELECT 1 FROM files f WHERE f.file_id = e.file_id)"
    ),
    "passes belong to no example": (
        "SELECT pass_id FROM passes INDEXED BY passes_by_example"
        " WHERE example_id NOT IN (SELECT example_id FROM examples)"
    ),
    "checkpoints hold passes that the ledger has never seen": (
        "SELECT checkpoint_id FROM checkpoints WHERE NOT undone"
        " AND marker > (SELECT coalesce(max(pass_id), 0) FROM passes)"
    ),
}
"""What is wrong -> the ids of what is wrong. Found: the ledger is not opened."""

# Not by the index: it would lead to every page of the table once for each of its rows.
_COUNTED = (
    "(SELECT example_id AS id, count(*) AS done, max(pass_id) AS newest FROM passes p NOT INDEXED"
    f" WHERE NOT undone AND {OWN} GROUP BY example_id)"
)
REPAIRED = {
    "passes_done and last_pass are those of the passes that count": (
        "UPDATE examples SET passes_done = coalesce(c.done, 0), last_pass = coalesce(c.newest, 0), last_loss ="
        " (SELECT coalesce(loss_after, loss_before) FROM passes WHERE pass_id = c.newest)"
        f" FROM examples e LEFT JOIN {_COUNTED} c ON c.id = e.example_id"
        " WHERE e.example_id = examples.example_id"
        " AND (e.passes_done <> coalesce(c.done, 0) OR e.last_pass <> coalesce(c.newest, 0))"
        " RETURNING examples.example_id"
    ),
    "a trained example has had enough passes": (
        "UPDATE examples SET state = 'accepted', reason = 'checked on start: it wants more passes'"
        f" WHERE state IN ('trained', 'durable') AND NOT {_ENOUGH} RETURNING example_id"
    ),
    "an example that has had enough passes is trained": (
        "UPDATE examples SET state = 'trained', reason = NULL"
        " WHERE state = 'accepted' AND passes_done >= passes RETURNING example_id"
    ),
    "a durable example is in the newest checkpoint": (
        "UPDATE examples SET state = 'trained', reason = 'checked on start: it is in no checkpoint'"
        f" WHERE state = 'durable' AND last_pass > {_MARKER} RETURNING example_id"
    ),
    "a trained example that is in the newest checkpoint is durable": (
        "UPDATE examples SET state = 'durable', reason = NULL"
        f" WHERE state = 'trained' AND last_pass <= {_MARKER} RETURNING example_id"
    ),
    "a file is rejected if it has no example, and accepted otherwise": (
        "UPDATE files SET state = iif(state = 'accepted', 'rejected', 'accepted') WHERE state <> 'staging'"
        " AND (state = 'accepted') <> EXISTS (SELECT 1 FROM examples e WHERE e.file_id = files.file_id)"
        " RETURNING file_id"
    ),
}
"""What holds -> the statement that makes it hold, and returns the ids of what it changed. In this order."""

logger = log.get(__name__)


def check_file(db: Database) -> None:
    """After a crash, SQLite's own check of the file; and what `REFUSED` says.

    Raises:
        LedgerError: the ledger cannot be used; one message with everything that was found.
    """
    began = time.perf_counter()
    problems: list[str] = []
    with db.read() as connection:
        clean = connection.execute("SELECT value FROM meta WHERE key = ?", (_CLEAN,)).fetchone()
        if clean != ("1",):
            problems = [row[0] for row in connection.execute("PRAGMA quick_check(5)") if row[0] != "ok"]
        if not problems:
            for what, query in REFUSED.items():
                ids = [row[0] for row in connection.execute(f"{query} ORDER BY 1 LIMIT 6")]
                if ids:
                    problems.append(f"{what} ({_listed(ids)})")
    if problems:
        raise LedgerError(f"{db.path}: is damaged: {'; '.join(problems)}. {_ADVICE}")
    _set_clean(db, False)
    if clean == ("0",):
        logger.info("ledger.unclean", checked_ms=round((time.perf_counter() - began) * 1000))


def repair(db: Database) -> None:
    """Makes `REPAIRED` hold, and logs what did not."""
    with db.write(fsync=True) as connection:
        for what, statement in REPAIRED.items():
            ids = [row[0] for row in connection.execute(statement)]
            if ids:
                logger.warning("ledger.repaired", invariant=what, count=len(ids), ids=_listed(ids))


def note_clean(db: Database) -> None:
    """On an orderly close: the next start need not read the whole file."""
    _set_clean(db, True)


def _set_clean(db: Database, clean: bool) -> None:
    with db.write(fsync=True) as connection:
        connection.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
            (_CLEAN, str(int(clean))),
        )


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
