"""Which passes a checkpoint holds, and what becomes of examples when the weights go back to one.

    crash     the weights in memory are gone: what lost passes is trained again
    rollback  somebody asked for older weights: what lost passes stays out ("undone"), or is trained again

    guard     the same, and what lost passes is quarantined, with the evidence

An example that was set aside (failed, undone, quarantined) stays so, unless the weights hold all its passes again:
going back to a checkpoint that an earlier rollback had left brings back the passes that are in it.
"""

from sqlite3 import Connection

from hogwild.ledger_records import Reset, State
from hogwild.ledger_schema import OWN

_TEMPORARY = (
    "chain (id INTEGER PRIMARY KEY)",  # the checkpoint and those that it follows
    "held (first INTEGER PRIMARY KEY, last INTEGER)",  # passes that they hold
    "changed (pass_id INTEGER PRIMARY KEY, lost INTEGER)",  # 1: it goes, 0: it comes back
    "touched (example_id INTEGER PRIMARY KEY, lost INTEGER, becomes TEXT)",
)
_ENOUGH = "(passes_done >= passes OR coalesce(last_loss <= until_loss, 0))"


def note_passes(db: Connection, checkpoint_id: int, marker: int) -> None:
    """Writes down which passes a new checkpoint holds: those of the one before it, and what has counted since."""
    before = db.execute(
        "SELECT checkpoint_id, marker FROM checkpoints WHERE NOT undone AND checkpoint_id < ? AND marker <= ?"
        " ORDER BY checkpoint_id DESC LIMIT 1",
        (checkpoint_id, marker),
    ).fetchone()
    follows, since = before or (None, 0)
    db.execute("UPDATE checkpoints SET follows = ? WHERE checkpoint_id = ?", (follows, checkpoint_id))
    db.execute(
        "INSERT INTO checkpoint_passes SELECT ?, min(pass_id), max(pass_id) FROM"
        " (SELECT pass_id, pass_id - row_number() OVER (ORDER BY pass_id) AS run FROM passes"
        "  WHERE pass_id > ? AND pass_id <= ? AND NOT undone) GROUP BY run",
        (checkpoint_id, since, marker),
    )


def go_back(db: Connection, marker: int, to: State, why: str) -> Reset:
    """Makes the ledger say what the weights of the checkpoint with this marker hold. 0: the model as it came.

    Args:
        to: "accepted", "undone" or "quarantined": what becomes of examples that lose passes.
        why: kept with them, and in the transitions.
    """
    for table in _TEMPORARY:
        db.execute(f"CREATE TEMP TABLE IF NOT EXISTS {table}")
        db.execute(f"DELETE FROM temp.{table.split()[0]}")
    left = db.execute(
        "SELECT checkpoint_id FROM checkpoints WHERE marker = ?1 AND undone AND NOT EXISTS"
        " (SELECT 1 FROM checkpoints WHERE marker = ?1 AND NOT undone) ORDER BY checkpoint_id DESC",
        (marker,),
    ).fetchone()
    if left and marker:
        _return_to_abandoned(db, left[0])
    else:
        db.execute(
            "INSERT INTO changed SELECT pass_id, 1 FROM passes WHERE pass_id > ? AND NOT undone", (marker,)
        )
        db.execute("UPDATE checkpoints SET undone = 1 WHERE marker > ? AND NOT undone", (marker,))
    db.execute("DELETE FROM meta WHERE key = 'checkpoint_begun'")  # it is of weights that were left
    lost, found = db.execute(
        "SELECT coalesce(sum(lost), 0), coalesce(sum(NOT lost), 0) FROM changed"
    ).fetchone()
    db.execute(
        "INSERT INTO touched SELECT example_id, max(lost), NULL FROM changed JOIN passes USING (pass_id)"
        f" WHERE {OWN} GROUP BY example_id"
    )
    db.execute("UPDATE passes SET undone = c.lost FROM changed c WHERE passes.pass_id = c.pass_id")
    counted = f"FROM passes p WHERE p.example_id = e.example_id AND NOT p.undone AND {OWN}"
    db.execute(
        f"UPDATE examples AS e SET passes_done = (SELECT count(*) {counted}),"
        f" last_pass = (SELECT coalesce(max(p.pass_id), 0) {counted}),"
        f" last_loss = (SELECT coalesce(p.loss_after, p.loss_before) {counted} ORDER BY p.pass_id DESC LIMIT 1)"
        " WHERE example_id IN (SELECT example_id FROM touched)"
    )
    # One that only got passes back, and wants more, stays what it is.
    db.execute(
        "UPDATE touched SET becomes = (SELECT CASE WHEN state = 'failed' THEN state"
        f" WHEN {_ENOUGH} THEN 'durable'"
        " WHEN state IN ('undone', 'quarantined') OR NOT touched.lost THEN state ELSE ? END"
        " FROM examples e WHERE e.example_id = touched.example_id)",
        (to,),
    )
    db.execute(
        "UPDATE examples SET state = becomes, reason = iif(becomes = 'durable', NULL, ?) FROM touched t"
        " WHERE t.example_id = examples.example_id AND state <> becomes",
        (why,),
    )
    reopened, set_aside = db.execute(
        "SELECT count(*) FILTER (WHERE becomes = 'accepted'),"
        " count(*) FILTER (WHERE becomes IN ('undone', 'quarantined') AND lost) FROM touched"
    ).fetchone()
    return Reset(lost, reopened, examples_undone=set_aside, passes_redone=found)


def _return_to_abandoned(db: Connection, checkpoint_id: int) -> None:
    """The checkpoint is not among those that led to the present weights: passes come as well as go."""
    db.execute(
        "INSERT INTO chain WITH RECURSIVE up(id) AS (VALUES (?) UNION"
        " SELECT follows FROM checkpoints JOIN up ON checkpoint_id = id WHERE follows IS NOT NULL)"
        " SELECT id FROM up",
        (checkpoint_id,),
    )
    db.execute(
        "INSERT INTO held SELECT first_pass, last_pass FROM checkpoint_passes"
        " WHERE checkpoint_id IN (SELECT id FROM chain)"
    )
    is_held = (
        "coalesce((SELECT last FROM held WHERE first <= pass_id ORDER BY first DESC LIMIT 1) >= pass_id, 0)"
    )
    db.execute(f"INSERT INTO changed SELECT pass_id, NOT undone FROM passes WHERE undone = {is_held}")
    db.execute("UPDATE checkpoints SET undone = checkpoint_id NOT IN (SELECT id FROM chain)")
