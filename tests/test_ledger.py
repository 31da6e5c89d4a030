import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hogwild.errors import AlreadyAccepted, LedgerError
from hogwild.examples import parse_line
from hogwild.ledger import BadLine, Counts, GoodLine, Growing, Ledger, Pass, Reset
from hogwild.ledger_schema import APPLICATION_ID, MIGRATIONS, VERSION


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as ledger:
        yield ledger


def good(text: str, line_no: int = 1, **fields: object) -> GoodLine:
    extra = "".join(f', "{name}": {value}' for name, value in fields.items())
    raw = f'{{"text": "{text}"{extra}}}'.encode()
    return GoodLine(line_no, 0, raw, parse_line(raw))


def drop(
    ledger: Ledger,
    *lines: GoodLine | BadLine,
    name: str = "a.jsonl",
    passes: int = 1,
    content_hash: str = "",
    **options,
):
    return ledger.accept_file(name, content_hash or f"hash of {name}", lines, passes=passes, **options)


def one_pass(ledger: Ledger, example_id: int, loss: float = 1.0, after: float | None = 0.5):
    (outcome,) = ledger.record_passes(
        [Pass(example_id, loss, after, tokens=3, step=1, thread=0, arena_id="arena")]
    )
    return outcome


def train_everything(ledger: Ledger) -> None:
    while pending := ledger.pending(10):
        one_pass(ledger, pending[0].example_id)


def states(path) -> list[tuple]:
    with sqlite3.connect(path) as shell:
        return shell.execute("SELECT example_id, state, passes_done FROM examples ORDER BY 1").fetchall()


# --- accepting ---


def test_what_is_accepted_is_kept_as_it_was_written_and_found_in_the_order_of_arrival(ledger):
    record = drop(
        ledger, good("Zoë", 1, id='"z"'), BadLine(2, 20, "txt", "unknown field", "{...}"), good("b", 3)
    )
    assert (record.state, record.examples, record.pending, record.rejected) == ("accepted", 2, 2, 1)
    first, second = ledger.pending(10)
    assert (first.file, first.line_no, first.name, first.passes) == ("a.jsonl", 1, "z", 1)
    assert first.line == '{"text": "Zoë", "id": "z"}'
    assert first.example().text == "Zoë"
    assert second.line_no == 3
    assert ledger.rejected(record.file_id) == [(1, BadLine(2, 20, "txt", "unknown field", "{...}"))]
    assert ledger.files() == [record]


def test_the_same_content_is_refused_unless_forced(ledger):
    drop(ledger, good("a"))
    with pytest.raises(AlreadyAccepted, match=r"accepted as a\.jsonl at 20") as caught:
        drop(ledger, good("a"))
    assert caught.value.name == "a.jsonl"
    assert ledger.counts().pending == 1
    assert drop(ledger, good("a"), force=True).examples == 1
    assert ledger.counts() == Counts(pending=2, trained=0, durable=0, failed=0, rejected=0, files=2, passes=0)
    with pytest.raises(AlreadyAccepted):
        drop(ledger, good("a"))


def test_force_on_new_content_still_remembers_it(ledger):
    drop(ledger, good("a"), force=True)
    with pytest.raises(AlreadyAccepted):
        drop(ledger, good("a"))


def test_a_file_without_a_good_line_is_on_record_but_may_come_again(ledger):
    for _ in range(2):
        record = drop(ledger, BadLine(1, 0, None, "not JSON", "x"))
        assert (record.state, record.examples, record.rejected) == ("rejected", 0, 1)
    assert ledger.is_idle()


def test_a_file_that_fails_while_it_is_read_leaves_nothing(ledger, path):
    def lines():
        for i in range(1200):
            yield good(f"line {i}", i + 1)
        yield BadLine(1201, 0, None, "bad", "")
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        ledger.accept_file("a.jsonl", "h", lines(), passes=1)
    assert ledger.counts() == Counts(0, 0, 0, 0, 0, 0, 0)
    assert states(path) == []
    assert ledger.accept_file("a.jsonl", "h", [good("x")], passes=1).examples == 1


KILLED_WHILE_ACCEPTING = """
import os, signal, sys
from pathlib import Path
from hogwild.examples import parse_line
from hogwild.ledger import GoodLine, Ledger
ledger = Ledger(Path(sys.argv[1]))
def lines(count, die):
    for i in range(count):
        raw = b'{"text": "line %d"}' % i
        yield GoodLine(i + 1, 0, raw, parse_line(raw))
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
ledger.accept_file("whole.jsonl", "1", lines(700, False), passes=1)
ledger.accept_file("half.jsonl", "2", lines(1200, True), passes=1)
"""


def test_kill_9_keeps_accepted_files_whole_and_forgets_half_read_ones(path):
    child = subprocess.run([sys.executable, "-c", KILLED_WHILE_ACCEPTING, str(path)], timeout=60)
    assert child.returncode == -signal.SIGKILL
    with Ledger(path) as ledger:  # also: the dead process no longer owns it
        assert [file.name for file in ledger.files()] == ["whole.jsonl"]
        assert ledger.counts().pending == 700
        assert len(states(path)) == 700
        assert ledger.accept_file("half.jsonl", "2", [good("x")], passes=1).examples == 1


KILLED_WHILE_SHOWING = """
import os, signal, sys
import hogwild.ledger_files
hogwild.ledger_files.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_right_after_the_commit_still_means_accepted(path):
    script = KILLED_WHILE_SHOWING + KILLED_WHILE_ACCEPTING
    child = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert child.returncode == -signal.SIGKILL
    with Ledger(path) as ledger:
        assert ledger.counts().pending == 700
        assert len(ledger.pending(1000)) == 700


def test_trainers_record_while_a_long_file_is_being_accepted(ledger):
    drop(ledger, *[good(f"first {i}", i + 1) for i in range(20)])
    recorded = []

    def lines():
        for i in range(2000):
            if i % 100 == 0:
                thread = threading.Thread(target=lambda n=i // 100: recorded.append(one_pass(ledger, n + 1)))
                thread.start()
                thread.join(60)
            yield good(f"second {i}", i + 1)

    drop(ledger, *[], name="none")
    ledger.accept_file("long.jsonl", "long", lines(), passes=1)
    assert [outcome.state for outcome in recorded] == ["trained"] * 20
    assert ledger.counts().pending == 2000


# --- training ---


def test_fewest_passes_first_then_priority_then_arrival(ledger):
    drop(ledger, good("a"), good("b", 2, priority=2), good("c", 3, priority=2), passes=2)
    order = []
    while pending := ledger.pending(1):
        order.append(pending[0].example_id)
        one_pass(ledger, pending[0].example_id)
    assert order == [2, 3, 1, 2, 3, 1]
    assert ledger.is_idle()


def test_pending_skips_what_is_in_flight_and_respects_the_limit(ledger):
    drop(ledger, *[good(f"{i}", i + 1) for i in range(10)])
    assert [p.example_id for p in ledger.pending(3, {1, 2, 4})] == [3, 5, 6]
    assert ledger.pending(10, set(range(1, 11))) == []


def test_pending_stays_within_its_memory_however_long_the_lines(ledger):
    drop(ledger, *[good("x" * 4_000_000, i + 1) for i in range(10)])
    assert 1 <= len(ledger.pending(10)) <= 5


def test_a_line_may_say_how_often_and_until_when(ledger):
    drop(ledger, good("a", 1, passes=3), good("b", 2, until_loss=0.5, passes=9), good("c", 3))
    outcome = [one_pass(ledger, 1, after=0.1).state for _ in range(3)]
    assert outcome == ["accepted", "accepted", "trained"]
    assert one_pass(ledger, 2, loss=0.7, after=0.6).state == "accepted"
    assert one_pass(ledger, 2, loss=0.5, after=None).state == "trained"
    assert one_pass(ledger, 3).passes_done == 1


def test_a_loss_that_is_not_a_number_is_noted_and_does_not_count_as_reached(ledger, path):
    drop(ledger, good("a", 1, until_loss=9, passes=3))
    assert one_pass(ledger, 1, loss=float("nan"), after=float("nan")).state == "accepted"
    with sqlite3.connect(path) as shell:
        assert shell.execute("SELECT loss_before, loss_after FROM passes").fetchall() == [(None, None)]


def test_passes_of_one_step_are_recorded_together_or_not_at_all(ledger):
    drop(ledger, good("a"), good("b", 2), passes=2)
    unknown = Pass(99, 1, 1, 1, 1, 0, "arena")
    with pytest.raises(LedgerError, match="example 99"):
        ledger.record_passes([Pass(1, 1, 1, 1, 1, 0, "arena"), unknown])
    assert ledger.counts().passes == 0
    assert [
        o.passes_done for o in ledger.record_passes([Pass(i, 1, 1, 1, 1, 0, "arena") for i in (1, 2)])
    ] == [1, 1]


def test_what_cannot_be_trained_is_set_aside_with_its_reason(ledger, path):
    record = drop(ledger, good("a"), good("b", 2))
    ledger.set_failed(1, "5000 tokens")
    assert [p.example_id for p in ledger.pending(10)] == [2]
    assert ledger.file(record.file_id).failed == 1
    with sqlite3.connect(path) as shell:
        assert shell.execute("SELECT reason FROM examples WHERE state = 'failed'").fetchall() == [
            ("5000 tokens",)
        ]
    with pytest.raises(LedgerError, match="example 1 cannot be trained"):
        one_pass(ledger, 1)


def test_many_threads_lose_no_pass(ledger):
    drop(ledger, *[good(f"{i}", i + 1) for i in range(8)], passes=1000)
    threads = [
        threading.Thread(target=lambda n=n: [one_pass(ledger, n % 8 + 1) for _ in range(50)])
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ledger.counts().passes == 800
    assert {p.passes_done for p in ledger.pending(10)} == {100}


# --- checkpoints ---


def test_durable_is_what_was_trained_before_the_snapshot_began(ledger, path):
    drop(ledger, good("a"), good("b", 2), good("c", 3, passes=2))
    one_pass(ledger, 1)
    one_pass(ledger, 3)
    marker = ledger.begin_checkpoint()
    one_pass(ledger, 2)  # while the snapshot is being written: may or may not be in it
    assert ledger.complete_checkpoint(marker, step=2, path="ckpt-2") == 1
    assert states(path) == [(1, "durable", 1), (2, "trained", 1), (3, "accepted", 1)]
    assert ledger.durable_marker() == marker
    assert ledger.has_passes_to_save(), "although no step was made since"
    assert ledger.complete_checkpoint(ledger.begin_checkpoint(), step=3, path="ckpt-3") == 1
    assert not ledger.has_passes_to_save()


def test_losing_the_arena_undoes_exactly_what_no_checkpoint_holds(ledger, path):
    drop(ledger, good("a"), good("b", 2), good("c", 3, passes=2), good("d", 4))
    one_pass(ledger, 1)
    one_pass(ledger, 3, after=0.25)
    ledger.complete_checkpoint(ledger.begin_checkpoint(), 2, "ckpt")
    one_pass(ledger, 2)
    one_pass(ledger, 3)
    ledger.set_failed(4, "too long")
    assert ledger.is_idle()
    assert ledger.has_passes_to_save()
    assert ledger.reset_to_durable() == Reset(passes_undone=2, examples_reopened=2)
    assert not ledger.has_passes_to_save(), "what is undone is in no weights"
    assert states(path) == [(1, "durable", 1), (2, "accepted", 0), (3, "accepted", 1), (4, "failed", 0)]
    assert [p.example_id for p in ledger.pending(10)] == [2, 3]
    with sqlite3.connect(path) as shell:
        assert shell.execute("SELECT last_pass, last_loss FROM examples WHERE example_id = 3").fetchone() == (
            2,
            0.25,
        )
    assert ledger.reset_to_durable() == Reset(0, 0)
    train_everything(ledger)
    assert ledger.complete_checkpoint(ledger.begin_checkpoint(), 6, "ckpt") == 2
    assert ledger.counts() == Counts(0, 0, durable=3, failed=1, rejected=0, files=1, passes=4)


def test_without_a_checkpoint_everything_is_undone(ledger):
    drop(ledger, good("a"), passes=3)
    for _ in range(3):
        one_pass(ledger, 1)
    assert ledger.reset_to_durable() == Reset(3, 1)
    assert ledger.pending(1)[0].passes_done == 0


def test_going_back_to_an_older_checkpoint_forgets_the_newer_ones(ledger, path):
    drop(ledger, good("a"), good("b", 2))
    one_pass(ledger, 1)
    older = ledger.begin_checkpoint()
    ledger.complete_checkpoint(older, 1, "one")
    one_pass(ledger, 2)
    ledger.complete_checkpoint(ledger.begin_checkpoint(), 2, "two")
    assert ledger.reset_to_durable(older) == Reset(1, 1)
    assert states(path) == [(1, "durable", 1), (2, "accepted", 0)]
    assert ledger.durable_marker() == older
    assert ledger.reset_to_durable(0) == Reset(1, 1)
    assert ledger.durable_marker() == 0


# --- rollback ---


def checkpoint(ledger: Ledger, generation: int, parent: int = 0) -> int:
    marker = ledger.begin_checkpoint()
    ledger.complete_checkpoint(marker, 1, f"ckpt-{generation}", generation=generation, parent=parent)
    return marker


def test_a_rollback_puts_aside_what_lost_passes_and_leaves_the_rest_alone(ledger, path):
    lines = [good(text, i) for i, text in enumerate("abcdef", 1)]
    drop(ledger, *lines, passes=2)
    train = [1, 1, 2]  # a is durable, b half done
    for example_id in train:
        one_pass(ledger, example_id)
    first = checkpoint(ledger, 1)
    for example_id in (2, 3, 3, 4):  # b done, c done, d half done; e never trained
        one_pass(ledger, example_id)
    checkpoint(ledger, 2, parent=1)
    ledger.set_failed(6, "too long", "text")
    assert ledger.roll_back(first, retrain=False) == Reset(4, 0, examples_undone=3)
    assert states(path) == [
        (1, "durable", 2),
        (2, "undone", 1),
        (3, "undone", 0),
        (4, "undone", 0),
        (5, "accepted", 0),
        (6, "failed", 0),
    ]
    assert [p.example_id for p in ledger.pending(9)] == [5]
    assert ledger.counts() == Counts(1, 0, 1, failed=1, rejected=0, files=1, passes=3, undone=3)
    assert ledger.files()[0].examples == 6
    assert ledger.durable_marker() == first
    with pytest.raises(LedgerError, match="example 3 cannot be trained: it failed, was undone"):
        one_pass(ledger, 3)
    with sqlite3.connect(path) as shell:
        assert shell.execute("SELECT generation, parent, undone FROM checkpoints").fetchall() == [
            (1, 0, 0),
            (2, 1, 1),
        ]
    # What was put aside stays there when the arena is lost, and comes back when it is asked for.
    assert ledger.reset_to_durable(0) == Reset(3, 1, examples_undone=1)
    assert states(path)[:3] == [(1, "accepted", 0), (2, "undone", 0), (3, "undone", 0)]
    assert ledger.retrain([3]) == 1
    assert ledger.retrain(file="other.jsonl") == 0
    assert ledger.retrain(file="a.jsonl") == 2
    assert [p.example_id for p in ledger.pending(9)] == [1, 2, 3, 4, 5]


def test_a_rollback_may_queue_again_what_it_undid(ledger, path):
    drop(ledger, good("a"), good("b", 2), passes=2)
    one_pass(ledger, 1)
    marker = checkpoint(ledger, 1)
    train_everything(ledger)
    checkpoint(ledger, 2, parent=1)
    assert ledger.roll_back(marker, retrain=True) == Reset(3, 2)
    assert states(path) == [(1, "accepted", 1), (2, "accepted", 0)]
    train_everything(ledger)
    checkpoint(ledger, 3, parent=1)
    assert states(path) == [(1, "durable", 2), (2, "durable", 2)]
    assert ledger.roll_back(0, retrain=False) == Reset(4, 0, examples_undone=2)
    assert ledger.durable_marker() == 0


@pytest.mark.parametrize("retrain", [False, True])
def test_going_to_a_generation_that_an_earlier_rollback_left_brings_its_passes_back(ledger, path, retrain):
    drop(ledger, good("a"), good("b", 2), good("c", 3), good("d", 4), passes=1)
    one_pass(ledger, 1)
    first = checkpoint(ledger, 1)
    one_pass(ledger, 2)
    second = checkpoint(ledger, 2, parent=1)
    one_pass(ledger, 3)
    third = checkpoint(ledger, 3, parent=2)
    ledger.roll_back(first, retrain=False)
    one_pass(ledger, 4)
    fourth = checkpoint(ledger, 4, parent=1)
    assert states(path) == [(1, "durable", 1), (2, "undone", 0), (3, "undone", 0), (4, "durable", 1)]
    assert ledger.roll_back(second, retrain=retrain) == Reset(
        1, int(retrain), examples_undone=int(not retrain), passes_redone=1
    )
    assert states(path)[:3] == [(1, "durable", 1), (2, "durable", 1), (3, "undone", 0)]
    assert states(path)[3] == (4, "accepted" if retrain else "undone", 0)
    assert ledger.durable_marker() == second
    ledger.roll_back(third, retrain=retrain)
    assert states(path)[:3] == [(1, "durable", 1), (2, "durable", 1), (3, "durable", 1)]
    ledger.roll_back(fourth, retrain=False)
    assert states(path)[3] == (4, "durable", 1)
    assert ledger.counts().passes == 2


def test_passes_that_a_crash_took_never_come_back(ledger, path):
    drop(ledger, good("a"), good("b", 2), passes=1)
    one_pass(ledger, 1)
    first = checkpoint(ledger, 1)
    one_pass(ledger, 2)
    assert ledger.reset_to_durable() == Reset(1, 1)
    one_pass(ledger, 2)
    second = checkpoint(ledger, 2, parent=1)
    ledger.roll_back(first, retrain=False)
    assert ledger.roll_back(second, retrain=False) == Reset(0, 0, passes_redone=1)
    assert states(path) == [(1, "durable", 1), (2, "durable", 1)]


def test_an_example_that_needs_no_more_passes_is_not_trained_again(ledger, path):
    """Two threads may be at it at once: the pass too many is undone, the others are enough."""
    drop(ledger, good("a"), passes=2)
    one_pass(ledger, 1)
    one_pass(ledger, 1)
    marker = checkpoint(ledger, 1)
    one_pass(ledger, 1)
    assert ledger.reset_to_durable() == Reset(1, 0)
    assert states(path) == [(1, "durable", 2)]
    one_pass(ledger, 1)
    assert ledger.roll_back(marker, retrain=False) == Reset(1, 0)


def test_every_change_of_state_is_on_record(ledger, path):
    drop(ledger, good("a", 1, until_loss=0.6), good("b", 2), passes=2)
    one_pass(ledger, 1)
    one_pass(ledger, 2)
    one_pass(ledger, 2)
    first = checkpoint(ledger, 1)
    one_pass(ledger, 2)
    ledger.roll_back(0, retrain=False)
    ledger.retrain()
    ledger.set_failed(1, "too long")
    assert first == 3
    with sqlite3.connect(path) as shell:
        files = shell.execute(
            "SELECT from_state, to_state, why FROM transitions WHERE file_id = 1"
        ).fetchall()
        changes = shell.execute(
            "SELECT from_state, to_state, why, pass_id FROM transitions WHERE example_id = 1"
        ).fetchall()
        story = shell.execute("SELECT event, loss FROM story WHERE example_id = 1 ORDER BY at").fetchall()
        ats = shell.execute("SELECT count(*) FROM transitions WHERE at LIKE '20__-__-__T__:__:__.___Z'")
        assert ats.fetchone()[0] == shell.execute("SELECT count(*) FROM transitions").fetchone()[0]
    assert files == [("staging", "accepted", "read to its end")]
    assert changes == [
        ("accepted", "trained", "its loss reached until_loss", 1),
        ("trained", "durable", "in checkpoint 1", 1),
        ("durable", "undone", "rolled back to the model as it came", None),
        ("undone", "accepted", "asked to be trained again", None),
        ("accepted", "failed", "too long", None),
    ]
    assert story[0] == ("accepted", None)
    assert ("pass, undone since", 0.5) in story


# --- the file itself ---


def test_it_reads_well_in_the_shell(ledger, path):
    drop(ledger, good("a"), BadLine(2, 9, None, "bad", ""), passes=1)
    with sqlite3.connect(path) as shell:
        assert shell.execute("SELECT file, examples, pending, rejected FROM progress").fetchall() == [
            ("a.jsonl", 1, 1, 1)
        ]
        assert (
            "higher first"
            in shell.execute("SELECT sql FROM sqlite_schema WHERE name = 'examples'").fetchone()[0]
        )
        assert shell.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert shell.execute("PRAGMA foreign_key_check").fetchall() == []


def test_the_next_example_is_found_without_reading_the_backlog(ledger):
    with ledger._db.read() as db:
        queries: list[str] = []
        db.set_trace_callback(queries.append)
        ledger.pending(3)
        db.set_trace_callback(None)
        plan = " ".join(row[3] for row in db.execute("EXPLAIN QUERY PLAN " + queries[0]))
    assert "examples_next" in plan
    assert "TEMP B-TREE" not in plan


def test_what_is_asked_every_few_seconds_does_not_look_through_all_passes(ledger):
    """Of a daemon that has trained for months they are millions, and trainers wait for the ledger meanwhile."""
    drop(ledger, *(good(f"line {number}", number) for number in range(1, 11)), passes=10_000)
    with ledger._db.write(fsync=False) as db:
        db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)"
            " INSERT INTO passes (example_id, at, loss_before, tokens, step, thread, arena)"
            " SELECT 1 + i % 10, '', 2.0, 3, i, 0, 'arena' FROM n"
        )
        db.execute("UPDATE examples SET passes_done = 5000, last_pass = 50000, last_loss = 2.0")
    instructions = 0

    def count_instructions() -> int:
        nonlocal instructions
        instructions += 100
        return 0

    with ledger._db.read() as db:
        db.set_progress_handler(count_instructions, 100)
    assert (ledger.counts().passes, ledger.remaining()) == (50_000, (50_000, 2.0))
    assert instructions < 20_000
    with ledger._db.read() as db:
        db.set_progress_handler(None, 0)
    ledger.roll_back(0, retrain=True)
    with ledger._db.read() as db:
        db.set_progress_handler(count_instructions, 100)
    instructions = 0
    assert (ledger.counts().passes, ledger.remaining()) == (0, (100_000, None))
    one_pass(ledger, 1, loss=3.0)
    assert ledger.remaining()[1] == 3.0
    assert instructions < 100_000


def test_facts_are_kept_across_restarts(path):
    with Ledger(path) as ledger:
        assert ledger.get_meta("arena") is None
        ledger.set_meta("arena", "1")
        ledger.set_meta("arena", "2")
        drop(ledger, good("a"))
    with Ledger(path) as ledger:
        assert ledger.get_meta("arena") == "2"
        assert ledger.counts().pending == 1
    with pytest.raises(LedgerError, match="closed"):
        ledger.counts()


def test_one_process_owns_it_and_others_may_read(ledger, path):
    drop(ledger, good("a"))
    with pytest.raises(LedgerError, match=f"in use by process {os.getpid()}"):
        Ledger(path)
    with Ledger(path, readonly=True) as reader:
        assert reader.counts().pending == 1
        with pytest.raises(LedgerError, match="readonly"):
            reader.set_meta("a", "b")


def test_it_can_be_read_while_no_daemon_runs(path):
    with Ledger(path) as ledger:
        drop(ledger, good("a"))
    with Ledger(path, readonly=True) as reader:
        assert reader.counts().pending == 1


def refuse(path, match: str, **options) -> None:
    with pytest.raises(LedgerError, match=match) as caught:
        Ledger(path, **options)
    assert str(path) in str(caught.value)


def test_what_is_not_a_ledger_is_refused_and_left_as_it_was(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("dear diary\n" * 100)
    refuse(text, "is not a ledger")
    assert text.read_text() == "dear diary\n" * 100
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    before = other.read_bytes()
    refuse(other, "not a ledger of hogwild")
    assert other.read_bytes() == before
    refuse(tmp_path, "is a folder")
    refuse(tmp_path / "absent.sqlite", "unable to open", readonly=True)


def test_a_newer_ledger_is_refused(path):
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    refuse(path, f"newer hogwild \\(schema {VERSION + 1}")


def test_an_older_ledger_is_migrated_and_a_failing_migration_changes_nothing(path, monkeypatch):
    with Ledger(path) as ledger:
        drop(ledger, good("a"))
    import hogwild.ledger_db as module

    monkeypatch.setattr(module, "VERSION", VERSION + 1)
    monkeypatch.setattr(
        module, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE extra (x INTEGER); SELECT nonsense;")
    )
    refuse(path, "nonsense")
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_schema WHERE name = 'extra'").fetchall() == []
    monkeypatch.setattr(module, "MIGRATIONS", (*MIGRATIONS, "ALTER TABLE examples ADD COLUMN extra INTEGER;"))
    refuse(path, "older hogwild", readonly=True)
    with Ledger(path) as ledger:
        assert ledger.counts().pending == 1
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT extra FROM examples").fetchall() == [(None,)]
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION + 1,)


def test_a_ledger_of_the_first_schema_goes_on_as_if_nothing_had_happened(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.executescript((Path(__file__).parent / "data" / "ledger-v1.sql").read_text())
        lines = db.execute("SELECT * FROM lines").fetchall()
        passes = db.execute("SELECT * FROM passes").fetchall()
    with Ledger(path) as ledger:
        assert ledger.counts() == Counts(1, 1, 2, failed=1, rejected=2, files=3, passes=4)
        assert [file.name for file in ledger.files()] == ["more.jsonl", "bad.jsonl", "facts.jsonl"]
        with pytest.raises(AlreadyAccepted):
            drop(ledger, good("a"), name="a.jsonl", content_hash="hash-1")
        assert [p.line for p in ledger.pending(9)] == ['{"text": "e"}']
        with sqlite3.connect(path) as shell:
            assert shell.execute("SELECT * FROM lines").fetchall() == lines
            assert [row[: len(passes[0])] for row in shell.execute("SELECT * FROM passes")] == passes
            assert shell.execute("PRAGMA foreign_key_check").fetchall() == []
            assert shell.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        # Its checkpoints can be gone back to, from the present and from one another.
        assert ledger.durable_marker() == 5
        assert ledger.roll_back(2, retrain=False) == Reset(2, 0, examples_undone=2)
        assert ledger.roll_back(5, retrain=False) == Reset(0, 0, passes_redone=1)
        assert states(path)[:3] == [(1, "durable", 1), (2, "durable", 2), (3, "undone", 0)]


def test_files_that_may_grow_are_still_known_after_the_migration(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        for script in MIGRATIONS[:4]:
            db.executescript(script)
        db.executescript(
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 4;"
            "INSERT INTO files (file_id, name, content_hash, bytes, content_bytes, state, forced, stored_as, moved,"
            " may_grow) VALUES (1, 'a', 'h1', 3, 3, 'rejected', 0, 'a', 1, 1),"
            " (2, 'b', 'h2', 5, 6, 'rejected', 0, 'b', 1, 0),"
            " (3, 'a', 'h3', 7, 8, 'rejected', 0, 'a', 1, 1);"  # killed before the first row of `a` was done with
        )
    with Ledger(path) as ledger:
        assert ledger.growing() == [Growing(3, "a", "a", "h3", 7, 8)]


# --- checked on start ---


def tamper(path, statement: str) -> None:
    with sqlite3.connect(path) as shell:
        shell.execute(statement)


@pytest.fixture
def used(path):
    """a is durable, b trained, c half done, d new, e failed, f undone; closed."""
    with Ledger(path) as ledger:
        drop(ledger, *[good(text, i) for i, text in enumerate("abcdef", 1)], passes=2)
        for example_id in (1, 1):
            one_pass(ledger, example_id)
        marker = checkpoint(ledger, 1)
        one_pass(ledger, 6)
        ledger.roll_back(marker, retrain=False)
        for example_id in (2, 2, 3):
            one_pass(ledger, example_id)
        ledger.set_failed(5, "too long")
    return [
        (1, "durable", 2),
        (2, "trained", 2),
        (3, "accepted", 1),
        (4, "accepted", 0),
        (5, "failed", 0),
        (6, "undone", 0),
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE examples SET passes_done = 9 WHERE example_id = 3",
        "UPDATE examples SET passes_done = 0, last_pass = 0 WHERE example_id = 1",
        "UPDATE examples SET last_pass = 1 WHERE example_id = 2",
        "UPDATE examples SET state = 'durable' WHERE example_id = 2",
        "UPDATE examples SET state = 'trained' WHERE example_id = 4",
        "UPDATE examples SET state = 'accepted' WHERE example_id = 2",
        "UPDATE examples SET state = 'trained' WHERE example_id = 1",
        "UPDATE files SET state = 'rejected'",
    ],
)
def test_what_follows_from_passes_and_checkpoints_is_repaired_and_said(path, used, capsys, statement):
    assert states(path) == used
    Ledger(path).close()
    assert "ledger.repaired" not in capsys.readouterr().out
    tamper(path, statement)
    with Ledger(path) as ledger:
        assert states(path) == used
        assert [file.state for file in ledger.files()] == ["accepted"]
    assert "ledger.repaired" in capsys.readouterr().out
    Ledger(path).close()
    assert "ledger.repaired" not in capsys.readouterr().out


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DELETE FROM lines WHERE example_id = 3", "examples have lost their text (3)"),
        (
            "UPDATE files SET state = 'staging'",
            "examples are visible of a file that was not read to its end (1, 2,",
        ),
        ("DELETE FROM files", "examples belong to no file (1, 2, 3, 4, 5, ...)"),
        ("DELETE FROM passes", "checkpoints hold passes that the ledger has never seen (1)"),
        (
            "INSERT INTO passes (pass_id, example_id, at, tokens, step, thread, arena)"
            " VALUES (99, 77, '', 1, 1, 1, 'a')",
            "passes belong to no example (99)",
        ),
    ],
)
def test_what_cannot_be_repaired_is_refused_in_one_message_and_left_as_it_is(path, statement, says):
    tamper(path, statement)
    before = states(path)
    for _ in range(2):
        refuse(path, "is damaged: .*restore ledger.sqlite from a copy")
        with pytest.raises(LedgerError) as caught:
            Ledger(path)
        assert says in str(caught.value)
    assert states(path) == before


def test_a_damaged_file_is_noticed_after_a_crash(path, used):
    with sqlite3.connect(path) as shell:
        page = shell.execute("PRAGMA page_size").fetchone()[0]
        root = shell.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'examples_by_file'").fetchone()[
            0
        ]
        shell.execute("UPDATE meta SET value = '0' WHERE key = 'clean_shutdown'")  # as a crash leaves it
    with path.open("r+b") as file:
        file.seek((root - 1) * page)
        kept = file.read(page)
        file.seek((root - 1) * page + 8)
        file.write(b"\xff" * 64)
    refuse(path, "damaged")
    with path.open("r+b") as file:
        file.seek((root - 1) * page)
        file.write(kept)
    Ledger(path).close()
    assert states(path) == used


def test_losses_before_and_after_are_of_the_same_examples(ledger):
    """Of each example: before its first own pass in between, and after its last. Replay is not progress."""
    drop(ledger, good("a", 1), good("b", 2), good("c", 3), passes=3)
    one_pass(ledger, 1, 9.0, 8.0)
    since = ledger.newest_pass()
    one_pass(ledger, 1, 4.0, None)
    one_pass(ledger, 1, 3.0, 2.0)
    one_pass(ledger, 2, 2.0, 1.0)
    one_pass(ledger, 3, 7.0, None)
    ledger.record_passes([Pass(3, 0.1, None, 3, 1, 0, "arena", replay=True)])
    found = ledger.trained_between(since, ledger.newest_pass())
    assert found == {"examples": 3, "passes": 5, "loss_before": 3.0, "loss_after": 1.5}
    assert ledger.trained_between(since, since)["passes"] == 0
    assert ledger.trained_between(since, since + 1)["loss_before"] == 4.0, (
        "nothing was measured after: what there is"
    )
