"""Storms: many files at once while every trainer thread is busy. `make storms` is the large version."""

import os

import pytest

from hogwild.ledger import Ledger
from storms import lines, queued, storm


@pytest.mark.parametrize("silent", [False, True], ids=["with events", "without the observer"])
def test_20_000_files_renamed_in_while_all_trainers_are_busy_are_all_taken_once(tmp_path, silent):
    """Also more names than the kernel queues events for. `storm` asserts that nothing is lost or doubled."""
    found = storm(tmp_path, 20_000, silent=silent, threads=os.cpu_count() or 1, kind="torch")
    assert found["memory_peak_mib"] - found["memory_before_mib"] < 200


def test_a_storm_among_threads_that_never_let_go_of_the_interpreter(tmp_path):
    storm(tmp_path, 1000, silent=False, threads=4, kind="python")


def test_a_queue_is_taken_in_bounded_memory(tmp_path):
    assert queued(tmp_path / "files", 5000)["memory_growth_mib"] < 150
    found = lines(tmp_path / "lines", 50_000)
    assert found["memory_growth_mib"] < 150
    with Ledger(tmp_path / "lines" / "ledger.sqlite") as ledger:
        assert [pending.name for pending in ledger.pending(2)] == ["0", "1"]
