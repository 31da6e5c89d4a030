"""What was learned, for mixing into later steps: looked up by index, never listed, so that a million are no matter."""

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from hogwild.ledger_db import Database
from hogwild.ledger_records import Pending

LEARNED = (
    "state IN ('trained', 'durable') AND weight > 0"  # the index examples_replayable has these very words
)
TRIES = 32  # random ids that are tried before the nearest learned one is taken


@dataclass(frozen=True, slots=True)
class Candidate:
    """A learned example that could be replayed."""

    example_id: int
    file_id: int
    tags: frozenset[str]
    loss: float
    """Its loss when it was last measured, nats per trained token."""


class Pool:
    """Every example that is learned, has a positive weight, and was not undone."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def bounds(self) -> tuple[int, int] | None:
        """Least and largest id in the pool; None while it is empty."""
        with self._db.read() as db:
            low = db.execute(f"SELECT min(example_id) FROM examples WHERE {LEARNED}").fetchone()[0]
            if low is None:
                return None
            return low, db.execute(f"SELECT max(example_id) FROM examples WHERE {LEARNED}").fetchone()[0]

    def of_all(self, rng: Random, low: int, high: int) -> int | None:
        """A learned example between two ids, each as likely as the next where most ids there are learned."""
        with self._db.read() as db:
            for _ in range(TRIES):
                guess = rng.randint(low, high)
                query = f"SELECT 1 FROM examples WHERE example_id = ? AND {LEARNED}"
                if db.execute(query, (guess,)).fetchone():
                    return guess
            above = rng.random() < 0.5  # from either side of a gap
            end, between = ("min", (guess, high)) if above else ("max", (low, guess))
            query = f"SELECT {end}(example_id) FROM examples WHERE {LEARNED} AND example_id BETWEEN ? AND ?"
            found: int | None = db.execute(query, between).fetchone()[0]
            return found

    def of_files(self, rng: Random) -> int | None:
        """A learned example of a file, each file as likely as the next, however many lines it has."""
        with self._db.read() as db:
            last = db.execute("SELECT max(file_id) FROM files").fetchone()[0]
            for _ in range(TRIES if last else 0):
                file_id = rng.randint(1, last)
                ends = [
                    db.execute(
                        f"SELECT {end}(example_id) FROM examples WHERE file_id = ? AND state = ?",
                        (file_id, state),
                    ).fetchone()[0]
                    for end in ("min", "max")
                    for state in ("trained", "durable")
                ]
                known = [end for end in ends if end is not None]
                if known and (found := self.of_all(rng, min(known), max(known))) is not None:
                    return found
        return None

    def candidate(self, example_id: int) -> Candidate:
        with self._db.read() as db:
            row = db.execute(
                "SELECT example_id, file_id, tags, coalesce((SELECT p.loss_before FROM passes p"
                " WHERE p.example_id = e.example_id AND p.replay AND NOT p.undone AND p.pass_id > e.last_pass"
                " ORDER BY p.pass_id DESC LIMIT 1), last_loss, 0) FROM examples e WHERE example_id = ?",
                (example_id,),
            ).fetchone()
        return Candidate(row[0], row[1], frozenset(filter(None, row[2].split("\n"))), row[3])

    def recently_replayed(self, count: int) -> list[int]:
        """The examples of the newest `count` replay passes."""
        with self._db.read() as db:
            query = "SELECT example_id FROM passes WHERE replay AND NOT undone ORDER BY pass_id DESC LIMIT ?"
            return [row[0] for row in db.execute(query, (count,))]

    def get(self, example_ids: Collection[int]) -> list[Pending]:
        """The examples themselves, in the order asked for; one that has left the pool is left out."""
        found = []
        with self._db.read() as db:
            for example_id in example_ids:
                row = db.execute(
                    "SELECT e.example_id, f.name, e.line_no, e.name, l.line, e.passes_done, e.passes, e.until_loss"
                    " FROM examples e JOIN files f USING (file_id) JOIN lines l USING (example_id)"
                    f" WHERE e.example_id = ? AND e.{LEARNED.replace('AND ', 'AND e.')}",
                    (example_id,),
                ).fetchone()
                if row:
                    found.append(Pending(*row))
        return found

    def reopen(self, example_id: int, *, passes: int, at_most: int) -> bool:
        """A learned example was forgotten: it wants `passes` more, unless that happened `at_most` times before.

        Its passes done so far stay counted, so it queues behind what is new.
        """
        with self._db.write(fsync=False) as db:
            return bool(
                db.execute(
                    "UPDATE examples SET state = 'accepted', reopened = reopened + 1, passes = passes_done + ?,"
                    " reason = 'forgotten: its loss in replay is above until_loss again'"
                    f" WHERE example_id = ? AND reopened < ? AND {LEARNED}",
                    (passes, example_id, at_most),
                ).rowcount
            )
