"""One daemon a spool: who may take files from it, who is refused, and when it is free again."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from hogwild import state_lock
from hogwild.errors import SpoolError, SpoolTakenError
from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.spool_lock import NAME, SpoolLock
from support import Daemon, wait_until
from world import World

LINE = {"prompt": "The lighthouse is kept by", "completion": " Ilsa Thorne."}


def test_a_second_daemon_with_a_state_folder_of_its_own_is_refused_and_takes_over_after_a_kill(world: World):
    first = world.daemon("first")
    first.wait_for("daemon.started")
    wait_until((first.spool / "failed").is_dir, "the spool is there")
    at_work = first.spool / "failed" / ".x.jsonl.errors.jsonl.tmp"  # as if it were just writing this
    at_work.touch()

    def second(name: str) -> Daemon:
        return world.daemon(name, spool__dir=first.spool, socket=world.root / f"{name}.sock")

    refused = second("refused")
    assert refused.popen.wait(120) == 1
    assert (
        f"another daemon takes files from {first.spool} (process {first.pid}): stop it, or give another spool.dir"
        in refused.tail()
    )
    assert "Traceback" not in refused.tail()
    assert at_work.exists(), "nothing of the first daemon's was swept away"
    found = json.loads(refused.command("doctor", "--quick", "--json").stdout)
    (complaint,) = [one for one in found if f"process {first.pid}" in one["found"]]
    assert (complaint["what"], complaint["level"]) == ("spool", "fail")
    first.drop("facts.jsonl", [LINE])
    first.wait_for("spool.accepted", file="facts.jsonl")

    first.kill()
    heir = second("heir")
    heir.wait_for("daemon.started")
    assert state_lock.holder(first.spool, NAME) == heir.pid
    first.drop("more.jsonl", [{**LINE, "completion": " Odd Thorne."}])
    heir.wait_for("spool.accepted", file="more.jsonl")


def test_a_daemon_whose_spool_cannot_be_used_yet_starts_and_takes_it_later(world: World):
    disk = world.root / "disk"
    disk.touch()
    daemon = world.daemon(spool__dir=disk / "spool")
    daemon.wait_for("spool.failed")
    assert daemon.alive
    disk.unlink()
    daemon.wait_for("spool.healed")
    assert state_lock.holder(disk / "spool", NAME) == daemon.pid


def test_the_lock_is_no_file_of_the_spool_and_only_its_owner_can_open_it(tmp_path: Path):
    lock = SpoolLock(tmp_path / "spool")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=tmp_path / "spool"), ledger, passes=1, hold=lock.hold)
        spool.claim()
        assert [path.name for path in spool.incoming.iterdir()] == [".hogwild-spool"]
        assert (tmp_path / "spool" / NAME).stat().st_mode & 0o777 == 0o600
        assert state_lock.holder(tmp_path / "spool", NAME) == os.getpid()


def test_a_spool_that_comes_back_with_another_daemon_in_it_is_left_alone_until_that_one_ends(tmp_path: Path):
    """Mounted only after the start, or replaced: the daemon goes on with what it has, and says what is the matter."""
    folder = tmp_path / "spool"
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        config = SpoolConfig(dir=folder, settle_s=0, rescan_interval_s=0.05)
        spool = Spool(config, ledger, passes=1, hold=SpoolLock(folder).hold)
        spool.claim()
        shutil.rmtree(folder)
        folder.mkdir()
        another = state_lock.lock(folder / NAME)
        with pytest.raises(SpoolTakenError, match=rf"\(process {os.getpid()}\)"):
            spool.prepare()
        stop = threading.Event()
        thread = threading.Thread(target=spool.run, args=(stop,))
        thread.start()
        try:
            (folder / "incoming" / "facts.jsonl").write_text('{"text": "a"}\n')
            assert not spool.scanned.wait(1.5)
            os.close(another)
            wait_until((folder / "done" / "facts.jsonl").exists, "it is learned once the other has gone")
        finally:
            stop.set()
            spool.wake()
            thread.join()


def test_a_file_system_that_knows_no_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As with some network file systems, on which spools have been for long."""

    def lock_(_path: Path) -> int:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(state_lock, "lock", lock_)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        lock = SpoolLock(tmp_path / "spool")
        spool = Spool(SpoolConfig(dir=tmp_path / "spool", settle_s=0), ledger, passes=1, hold=lock.hold)
        for _ in range(2):
            spool.prepare()
        (spool.incoming / "facts.jsonl").write_text('{"text": "a"}\n')
        spool.scan_once()
        assert ledger.counts().files == 1
    assert capsys.readouterr().out.count("spool.unlocked") == 1


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path):
    """Whoever may write the spool folder must not have the daemon empty a file of its own."""
    ledger = tmp_path / "ledger.sqlite"
    ledger.write_text("all that was learned")
    (tmp_path / NAME).symlink_to(ledger)
    with pytest.raises(SpoolError, match="cannot lock it"):
        SpoolLock(tmp_path).hold()
    assert ledger.read_text() == "all that was learned"


def test_the_number_of_a_process_elsewhere_is_not_taken_for_one_here(tmp_path: Path):
    held = state_lock.lock(tmp_path / NAME)
    os.pwrite(held, b"4194305\n", 0)  # above the largest number that Linux gives
    with pytest.raises(SpoolTakenError, match="process 4194305 of another machine or container"):
        SpoolLock(tmp_path).hold()
    os.close(held)
