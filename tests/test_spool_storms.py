"""Storms: many files at once while every trainer thread is busy. `make storms` is the large version."""

import os

from hogwild.ledger import Ledger
from storms import lines, make, queued, storm

FILES = 20_000  # more events than the kernel queues


def test_20_000_files_renamed_in_while_all_trainers_are_busy_are_all_taken_once(tmp_path):
    """With events, and then once more without the observer; `storm` asserts that nothing is lost or doubled."""
    options = {"threads": os.cpu_count() or 1, "kind": "torch"}
    make(tmp_path / "outside", FILES)
    found = storm(tmp_path / "first", tmp_path / "outside", silent=False, **options)
    assert found["memory_peak_mib"] - found["memory_before_mib"] < 200
    found = storm(tmp_path / "second", tmp_path / "first" / "spool" / "done", silent=True, **options)
    assert found["files"] == FILES


def test_a_storm_among_threads_that_never_let_go_of_the_interpreter(tmp_path):
    make(tmp_path / "outside", 500)
    storm(tmp_path / "spool", tmp_path / "outside", silent=False, threads=4, kind="python")


def test_a_queue_is_taken_in_bounded_memory(tmp_path):
    assert queued(tmp_path / "files", 2000)["memory_growth_mib"] < 150
    found = lines(tmp_path / "lines", 20_000)
    assert found["memory_growth_mib"] < 150
    with Ledger(tmp_path / "lines" / "ledger.sqlite") as ledger:
        assert [pending.name for pending in ledger.pending(2)] == ["0", "1"]
