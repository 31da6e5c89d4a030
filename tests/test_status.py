"""What `hogwild status` warns of, and when it stops."""

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hogwild import metrics
from hogwild.ledger import Ledger, Trip
from hogwild.plural import counted
from hogwild.screen import screen
from hogwild.settings import Config, SpoolConfig
from hogwild.spool import Spool
from hogwild.status import Status, Troubles
from support import wait_until

GOOD = '{"text": "a"}\n'


class Desk:
    def __init__(self, root: Path) -> None:
        self.config = Config(
            state_dir=root, spool=SpoolConfig(dir=root / "spool", settle_s=0, rescan_interval_s=0.1)
        )
        self.ledger = Ledger(root / "ledger.sqlite")
        self.spool = Spool(self.config.spool, self.ledger, passes=1)
        self.spool.prepare()
        self.failed = self.spool.failed
        self._status = Status(self.config, self.ledger)

    def drop(self, name: str, text: str) -> None:
        (self.spool.incoming / name).write_text(text)
        self.spool.scan_once()

    def status(self) -> dict[str, object]:
        self._status.expire()
        self._status.write_waiting("a server", Troubles(spool=self.spool.trouble))
        return dict(json.loads((self.config.state_dir / "status.json").read_text()))

    def warnings(self) -> list[str]:
        return [str(one) for one in self.status()["warnings"]]  # type: ignore[attr-defined]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.ledger.close()


def test_the_warning_about_bad_lines_goes_when_the_file_that_lists_them_does(desk: Desk) -> None:
    assert desk.warnings() == []
    desk.drop("a.jsonl", f"{GOOD}[]\n")
    (warning,) = desk.warnings()
    assert warning.startswith(f"1 line cannot be trained: {desk.failed / 'a.jsonl.errors.jsonl'}")

    desk.drop("b.jsonl", '[]\n{"txt": "b"}\n')
    (warning,) = desk.warnings()
    assert warning.startswith(f"3 lines of 2 files cannot be trained: {desk.failed}")

    (desk.failed / "a.jsonl.errors.jsonl").unlink()
    (warning,) = desk.warnings()
    assert warning.startswith(f"2 lines cannot be trained: {desk.failed / 'b.jsonl.errors.jsonl'}")
    (desk.failed / "b.jsonl.errors.jsonl").rename(desk.config.state_dir / "b.errors.jsonl")
    assert desk.warnings() == []
    assert desk.status()["rejected"] == 3, "they count as ever"

    desk.drop("c.jsonl", "[1]\n")
    (warning,) = desk.warnings()
    assert warning.startswith("1 line cannot be trained"), "only what is new"


def test_a_line_that_turns_out_not_to_be_trainable_is_warned_of_even_after_its_file_was_dealt_with(
    desk: Desk,
) -> None:
    desk.drop("a.jsonl", f"{GOOD}[]\n")
    (desk.failed / "a.jsonl.errors.jsonl").unlink()
    assert desk.warnings() == []
    desk.ledger.set_failed(1, "too long")
    desk.spool._write_errors()
    (warning,) = desk.warnings()
    assert warning.startswith(f"2 lines cannot be trained: {desk.failed / 'a.jsonl.errors.jsonl'}")


def test_a_spool_that_cannot_be_used_is_warned_of_until_it_can(desk: Desk) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=desk.spool.run, args=(stop,))
    away = desk.config.spool.dir.rename(desk.config.state_dir / "away")
    desk.config.spool.dir.write_text("a file where the folder was")
    thread.start()
    try:
        wait_until(lambda: desk.spool.trouble, "the spool's thread notices")
        (warning,) = desk.warnings()
        assert warning.startswith("no files are taken: ")
        assert str(desk.config.spool.dir) in warning
        desk.config.spool.dir.unlink()
        away.rename(desk.config.spool.dir)
        wait_until(lambda: not desk.spool.trouble, "and that it is mended")
        assert desk.warnings() == []
    finally:
        stop.set()
        desk.spool.wake()
        thread.join()


def test_a_folder_that_cannot_be_read_ends_no_daemon(desk: Desk) -> None:
    desk.drop("a.jsonl", f"{GOOD}[]\n")
    kept = desk.failed.rename(desk.config.state_dir / "kept")
    desk.failed.touch()
    assert desk.warnings() == []
    desk.failed.unlink()
    kept.rename(desk.failed)
    (warning,) = desk.warnings()
    assert warning.startswith("1 line cannot be trained")


def test_what_is_in_quarantine_is_no_bad_line_and_one_is_one(desk: Desk) -> None:
    desk.drop("a.jsonl", GOOD)
    desk.ledger.guards.set_aside(1, Trip("loss", 0, {}), "it hurt", {})
    desk.spool._write_errors()
    assert (desk.failed / "a.jsonl.errors.jsonl").exists()
    assert desk.warnings() == ["1 example is in quarantine: hogwild quarantine"]


def test_a_clock_that_is_put_right_makes_no_checkpoint_old_that_there_never_was(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a clock of its own starts in 1970; people alert on this one."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 50 * 365 * 86400)
    assert not (desk.config.state_dir / "checkpoints").exists()
    assert 0 <= metrics.checkpoint_age.collect()[0].samples[0].value < 3600


def test_the_screen_counts_as_people_do(desk: Desk) -> None:
    desk.drop("a.jsonl", f"{GOOD}[]\n")
    shown = io.StringIO()
    Console(width=160, file=shown).print(screen(desk.status()))
    assert "1 example waits, 1 bad line " in shown.getvalue()


def test_numbers_and_their_words() -> None:
    assert [counted(n, "line") for n in (0, 1, 2)] == ["0 lines", "1 line", "2 lines"]
    assert [counted(n, "pass is", "passes are") for n in (1, 3)] == ["1 pass is", "3 passes are"]
