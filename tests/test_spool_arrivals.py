"""Every way in which a file can arrive, by its owner or another user, whatever it is called."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zstandard
from structlog.testing import capture_logs

import hogwild.spool_grown
import hogwild.spool_read
import hogwild.spool_take
from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.spool_files import Lease
from test_permissions import NOBODY, place, unprivileged  # noqa: F401  # place is a fixture
from test_spool import Clock, names, settle

LINE = '{"text": "Ada was born in 1815."}\n'


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


@pytest.fixture
def spool(tmp_path, ledger, clock):
    spool = Spool(SpoolConfig(dir=tmp_path / "spool"), ledger, passes=1, clock=clock)
    spool.prepare()
    return spool


def texts(ledger: Ledger) -> list[str]:
    return [pending.example().text for pending in ledger.pending(100)]


# --- names ---

NAMES = [
    b"two\nlines.jsonl",
    "Zoë 😀 \u202e.jsonl".encode(),
    b"not utf-8 \xff\xfe.jsonl",
    b"quote ' \" ; -- .jsonl",
    b"%s {} $HOME.jsonl.gz",
    b"x" * 249 + b".jsonl",
    "ü".encode() * 122 + b".jsonl.zst",
    b" .jsonl",
    b"-rf.jsonl",
    b".force.force.jsonl",
]


def test_a_name_may_be_anything_that_a_file_system_allows(spool, ledger, clock):
    pack = {b".gz": gzip.compress, b".zst": zstandard.ZstdCompressor().compress}
    visible = [name for name in NAMES if not name.startswith(b".")]
    for i, name in enumerate(NAMES):
        data = f'{{"text": "{i}"}}\nbad {i}\n'.encode()
        (spool.incoming / os.fsdecode(name)).write_bytes(pack.get(name[name.rfind(b".") :], bytes)(data))
    scan = settle(spool, clock)
    assert len(scan.accepted) == len(visible)
    assert names(spool.incoming) == {".force.force.jsonl"}
    for file in ledger.files():
        assert (spool.done / file.stored_as).exists()
        (bad,) = (spool.failed / f"{file.stored_as}.errors.jsonl").read_bytes().splitlines()
        assert json.loads(bad)["file"] == file.name
        assert json.loads(bad)["line"] == 2
    again = [name for name in visible if name.endswith(b".jsonl")]
    for name in again:  # other content under the same name
        (spool.incoming / os.fsdecode(name)).write_bytes(b'{"text": "again"}\n' + name[:3].hex().encode())
    settle(spool, clock)
    assert names(spool.incoming) == {".force.force.jsonl"}
    assert len(names(spool.done)) == len(visible) + len(again)


def test_a_kill_between_accepting_and_moving_is_survived_by_any_name(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
import hogwild.spool_take as module
from hogwild.settings import SpoolConfig
from hogwild.ledger import Ledger
from hogwild.spool import Spool
root = Path(sys.argv[1])
module.move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
spool = Spool(SpoolConfig(dir=root / "spool", settle_s=0), Ledger(root / "ledger.sqlite"), passes=1)
spool.prepare()
spool.scan_once()
"""
    incoming = tmp_path / "spool" / "incoming"
    incoming.mkdir(parents=True)
    for i, name in enumerate(NAMES[:6]):
        text = "" if name.endswith(b".gz") else f'{{"text": "{i}"}}\n'
        (incoming / os.fsdecode(name)).write_text(text)
    child = subprocess.run([sys.executable, "-c", script, tmp_path], timeout=60)
    assert child.returncode == -signal.SIGKILL
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=tmp_path / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        spool.scan_once()
        assert sorted(texts(ledger)) == ["0", "1", "2", "3", "5"]
        assert ledger.unmoved() == []
        assert ledger.counts().files == 6
        assert names(spool.incoming) == set()


def test_an_empty_done_folder_is_not_needed_to_keep_names_apart(spool, ledger, clock):
    """The operator moves files out of done/ now and then; failed/<name>.errors.jsonl must not be overwritten."""
    for i in range(3):
        (spool.incoming / "facts.jsonl").write_text(f'{{"text": "{i}"}}\nbad {i}\n')
        settle(spool, clock)
        for path in spool.done.iterdir():
            path.unlink()
    assert len({file.stored_as for file in ledger.files()}) == 3
    assert len(names(spool.failed)) == 3


def test_a_file_named_like_a_list_of_errors_is_kept_apart_from_one(spool, ledger, clock):
    """Somebody has moved failed/facts.jsonl.errors.jsonl back, and drops facts.jsonl with a bad line again."""
    only_copy = '{"foo": "the only copy"}\n'
    (spool.incoming / "facts.jsonl.errors.jsonl").write_text(only_copy)
    settle(spool, clock)
    (spool.incoming / "facts.jsonl").write_text('{"text": "a"}\nbad\n')
    settle(spool, clock)
    (kept,) = [file.stored_as for file in ledger.files() if file.name.endswith(".errors.jsonl")]
    assert (spool.failed / kept).read_text() == only_copy
    assert '"line":2' in (spool.failed / "facts.jsonl.errors.jsonl").read_text()


# --- editors ---


def test_a_file_saved_by_an_editor_is_taken_once_and_whole(spool, ledger, clock):
    """As vim and emacs do it: a backup, the old file renamed away, a new one written."""
    path = spool.incoming / "facts.jsonl"
    (spool.incoming / ".facts.jsonl.swp").write_bytes(b"b0VIM")
    path.write_text('{"text": "first dra')
    spool.scan_once()
    path.rename(spool.incoming / "facts.jsonl~")
    path.write_text('{"text": "final"}\n')
    (spool.incoming / "#facts.jsonl#").write_text("auto-save")
    (spool.incoming / ".#facts.jsonl").symlink_to("user@host.1234")
    assert spool.scan_once().waiting == ["facts.jsonl"]
    clock.now += 100
    assert spool.scan_once().accepted == ["facts.jsonl"]
    assert texts(ledger) == ["final"]
    assert names(spool.incoming) == {".facts.jsonl.swp", "facts.jsonl~", "#facts.jsonl#", ".#facts.jsonl"}


# --- writers that pause ---

# A shell, because any user may run it.
WRITER = 'exec 3>"$0"; for part; do printf %s "$part" >&3; echo; read -r line; done'


class Writer:
    """A process that writes the parts one by one, when it is told, and keeps the file open until the end."""

    def __init__(self, path: Path, *parts: str, uid: int | None = None) -> None:
        self.child = subprocess.Popen(
            ["sh", "-c", WRITER, path, *parts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=uid,
        )
        assert self.child.stdout.readline()

    def go_on(self) -> None:
        self.child.stdin.write(b"\n")
        self.child.stdin.flush()
        assert self.child.stdout.readline()

    def close(self) -> None:
        self.child.communicate(b"\n", timeout=60)


def test_a_writer_of_any_user_is_waited_for_by_root_however_long_it_pauses(place):  # noqa: F811
    with Ledger(place / "ledger.sqlite") as ledger:
        clock = Clock()
        spool = Spool(SpoolConfig(dir=place / "spool"), ledger, passes=1, clock=clock)
        spool.prepare()
        for folder in (place / "spool", spool.incoming):
            folder.chmod(0o777)
        writer = Writer(spool.incoming / "a.jsonl", LINE, '{"text": "b"}\n', uid=NOBODY)
        for _ in range(5):
            clock.now += 1000
            assert spool.scan_once().waiting == ["a.jsonl"]
        writer.go_on()
        writer.close()
        assert settle(spool, clock).accepted == ["a.jsonl"]
        assert ledger.counts().pending == 2


@pytest.mark.parametrize("tail", ['{"text": "b"}\n{"text": "c"}\nbad\n', ""])
def test_what_a_writer_of_another_user_adds_after_a_long_pause_is_learned(place, tail):  # noqa: F811
    """Without root's rights nobody can know that a file of another user is still open: it is taken, and watched."""
    (place / "spool" / "incoming").mkdir(parents=True)
    for folder in (place / "spool", place / "spool" / "incoming"):
        folder.chmod(0o777)
    (place / "state").mkdir()
    (place / "state").chmod(0o777)
    path = place / "spool" / "incoming" / "slow.jsonl"
    writer = Writer(path, LINE, tail + '{"text": "las', 't"}\n', uid=12345)
    path.chmod(0o644)

    def work() -> str:
        with capture_logs() as said, Ledger(place / "state" / "ledger.sqlite") as ledger:
            clock = Clock()
            spool = Spool(SpoolConfig(dir=place / "spool"), ledger, passes=1, clock=clock)
            spool.prepare()
            assert settle(spool, clock).accepted == ["slow.jsonl"]
            assert texts(ledger) == ["Ada was born in 1815."]
            for stage in (1, 2):
                (place / f"ready{stage}").touch()
                while not (place / f"go{stage}").exists():
                    time.sleep(0.01)
                for _ in range(3):
                    clock.now += 10
                    spool.scan_once()
                    spool._growth.check(1)
                    spool._write_errors()
            grown = [entry["examples"] for entry in said if entry["event"] == "spool.grown"]
            lines = [(p.line_no, p.example().text) for p in ledger.pending(9)]
            record = ledger.files()[0].stored_as
            errors = place / "spool" / "failed" / f"{record}.errors.jsonl"
            bad = [json.loads(line)["line"] for line in errors.read_text().splitlines()]
            return json.dumps([grown, lines, bad, len(ledger.growing())])

    thread_result: list[str] = []
    thread = threading.Thread(target=lambda: thread_result.append(unprivileged(work, uid=54321)))
    thread.start()
    for stage in (1, 2):
        deadline = time.monotonic() + 60
        while not (place / f"ready{stage}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        writer.go_on()
        (place / f"go{stage}").touch()
    thread.join(60)
    writer.close()
    grown, lines, bad, watched = json.loads(thread_result[0])
    if tail:
        assert grown == [2, 1]
        assert lines == [[1, "Ada was born in 1815."], [2, "b"], [3, "c"], [5, "last"]]
        assert bad == [4, 5]  # the bad line, and the one that was cut off when it was looked at
    else:
        assert grown == [0, 1]
        assert lines == [[1, "Ada was born in 1815."], [2, "last"]]
    assert watched == 1


@pytest.fixture
def unknown_writers(monkeypatch):
    """As on a file system without leases, such as NFS."""
    for module in (hogwild.spool_read, hogwild.spool_grown):
        monkeypatch.setattr(module, "take_lease", lambda _fd: Lease.UNKNOWN)


def grow(spool: Spool, clock: Clock) -> None:
    for _ in range(3):
        clock.now += 10
        spool._growth.check(1)


@pytest.mark.usefixtures("unknown_writers")
@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
@pytest.mark.parametrize("first", [LINE, LINE.strip(), "", "bad\n", '{"text": "cut'])
def test_what_a_file_grows_by_is_taken_wherever_it_went_and_also_after_a_restart(
    tmp_path, clock, suffix, pack, first
):
    config = SpoolConfig(dir=tmp_path / "spool")
    path = config.dir / "incoming" / f"a.jsonl{suffix}"
    for life in range(3):
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            spool = Spool(config, ledger, passes=1, clock=clock)
            spool.prepare()
            if life == 0:
                path.write_bytes(pack(first.encode()))
            else:
                (taken,) = [*spool.done.glob("a.*"), *spool.failed.glob(f"a.jsonl{suffix}")]
                with taken.open("ab") as file:
                    file.write(pack(f'\n{{"text": "more {life}"}}\n'.encode()))
            settle(spool, clock)
            grow(spool, clock)
            grow(spool, clock)
            known = ["Ada was born in 1815."] if first.strip() == LINE.strip() else []
            assert texts(ledger) == known + [f"more {i}" for i in range(1, life + 1)]
            assert len(ledger.growing()) == 1


@pytest.mark.usefixtures("unknown_writers")
def test_the_tail_of_a_file_that_began_like_another_is_taken_too(spool, ledger, clock):
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    (spool.incoming / "b.jsonl").write_text(LINE)
    assert settle(spool, clock).duplicates == ["b.jsonl"]
    with (spool.done / "b.jsonl").open("a") as file:
        file.write('{"text": "b"}\n')
    grow(spool, clock)
    assert texts(ledger) == ["Ada was born in 1815.", "b"]


def start_over(tmp_path, clock: Clock) -> tuple[Ledger, Spool]:
    """As a daemon that starts on what the last one left."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    spool = Spool(SpoolConfig(dir=tmp_path / "spool"), ledger, passes=1, clock=clock)
    spool.prepare()
    return ledger, spool


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(f'{{"text": "{text}"}}\n')


@pytest.mark.usefixtures("unknown_writers")
def test_a_duplicate_that_grows_after_a_restart_is_not_forgotten(spool, ledger, clock, tmp_path):
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    (spool.incoming / "b.jsonl").write_text(LINE)
    assert settle(spool, clock).duplicates == ["b.jsonl"]
    ledger.close()
    known = ["Ada was born in 1815."]
    for life in range(2):  # and what came of it may grow as well
        ledger, spool = start_over(tmp_path, clock)
        for name in "ab":
            add(spool.done / f"{name}.jsonl", f"{name} {life}")
        grow(spool, clock)
        grow(spool, clock)
        known += [f"a {life}", f"b {life}"]
        assert texts(ledger) == known
        assert len(ledger.growing()) == 2
        ledger.close()


@pytest.mark.usefixtures("unknown_writers")
def test_a_duplicate_that_is_done_with_leaves_the_first_file_watched(spool, ledger, clock, tmp_path):
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    (spool.incoming / "b.jsonl").write_text(LINE)
    settle(spool, clock)
    (spool.done / "b.jsonl").unlink()
    grow(spool, clock)
    ledger.close()
    ledger, spool = start_over(tmp_path, clock)
    add(spool.done / "a.jsonl", "more")
    grow(spool, clock)
    assert texts(ledger) == ["Ada was born in 1815.", "more"]
    ledger.close()


@pytest.mark.usefixtures("unknown_writers")
def test_what_two_growing_files_have_in_common_is_learned_once(spool, ledger, clock):
    for name in "ab":
        (spool.incoming / f"{name}.jsonl").write_text(LINE)
        settle(spool, clock)
    for text in ("second", "third"):  # the second line of the one is there already when the other one gets it
        for name in "ab":
            add(spool.done / f"{name}.jsonl", text)
            grow(spool, clock)
    assert texts(ledger) == ["Ada was born in 1815.", "second", "third"]
    add(spool.done / "b.jsonl", "fourth")
    grow(spool, clock)
    assert texts(ledger)[3:] == ["fourth"]


KILLED_GROWING = """
import os, signal, sys
from pathlib import Path
import hogwild.spool_grown, hogwild.spool_read, hogwild.spool_take
from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.spool_files import Lease
root, where, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for module in (hogwild.spool_read, hogwild.spool_grown):
    module.take_lease = lambda _fd: Lease.UNKNOWN
owner = {"set_moved": Ledger, "set_grown": Ledger, "fsync_folder": hogwild.spool_take,
         "move": hogwild.spool_take}[where]
def die(*_, **__):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*_, **__)
real = getattr(owner, where)
setattr(owner, where, die)
now = [0.0]
spool = Spool(SpoolConfig(dir=root / "spool"), Ledger(root / "ledger.sqlite"), passes=1, clock=lambda: now[0])
spool.prepare()
for _ in range(4):
    spool.scan_once()
    now[0] += 100
    spool._growth.check(1)
"""


@pytest.mark.usefixtures("unknown_writers")
@pytest.mark.parametrize("name", ["new.jsonl", "duplicate.jsonl"])
@pytest.mark.parametrize("where", ["move", "set_moved", "set_grown", "fsync_folder"])
def test_what_comes_after_a_kill_while_a_growing_file_was_put_away_is_learned_once(
    tmp_path, clock, name, where
):
    """Killed at the first, the second, ... of these calls, while the file is taken and while its second line is.

    A duplicate that grows before it has left incoming/ is another file, which is learned as a whole.
    """
    for left in range(7):
        root = tmp_path / f"{left}"
        with Ledger(root / "ledger.sqlite") as ledger:
            spool = Spool(SpoolConfig(dir=root / "spool"), ledger, passes=1, clock=clock)
            spool.prepare()
            known = ["Ada was born in 1815."]
            if name == "duplicate.jsonl":
                (spool.incoming / "first.jsonl").write_text(LINE)
                settle(spool, clock)
        (root / "spool" / "incoming" / name).write_text(LINE)
        for life in range(2):
            child = subprocess.run([sys.executable, "-c", KILLED_GROWING, root, where, str(left)], timeout=60)
            assert child.returncode in (-signal.SIGKILL, 0)
            (path,) = (root / "spool").glob(f"*/{name}")
            if path.parent.name == "done" or name == "new.jsonl":
                add(path, f"line {life}")
                known.append(f"line {life}")
        ledger, spool = start_over(root, clock)
        settle(spool, clock)
        grow(spool, clock)
        grow(spool, clock)
        assert texts(ledger) == known, left
        add(spool.done / name, "last")
        grow(spool, clock)
        assert texts(ledger) == [*known, "last"], left
        ledger.close()


@pytest.mark.usefixtures("unknown_writers")
def test_a_file_rewritten_in_place_after_it_was_taken_is_reported(spool, ledger, clock):
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    with capture_logs() as said:
        with (spool.done / "a.jsonl").open("r+") as file:
            file.write('{"text": "something else that is longer than it was before"}\n')
        grow(spool, clock)
        grow(spool, clock)
    assert [entry["event"] for entry in said] == ["spool.rewritten"]
    assert texts(ledger) == ["Ada was born in 1815."]


@pytest.mark.usefixtures("unknown_writers")
def test_a_file_is_not_watched_for_ever(spool, ledger, clock):
    for i in range(3):
        (spool.incoming / f"{i}.jsonl").write_text(f'{{"text": "{i}"}}\n')
    settle(spool, clock)
    assert len(ledger.growing()) == 3
    (spool.done / "1.jsonl").unlink()
    grow(spool, clock)
    assert len(ledger.growing()) == 2
    clock.now += hogwild.spool_grown.WATCH_S + 1
    grow(spool, clock)
    assert ledger.growing() == []


def test_a_file_that_nobody_can_be_writing_is_not_watched(spool, ledger, clock, tmp_path):
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    assert ledger.growing() == []
    other = tmp_path / "other name"
    other.write_text('{"text": "linked"}\n')
    os.link(other, spool.incoming / "b.jsonl")  # whoever has the other name may still write
    settle(spool, clock)
    with other.open("a") as file:
        file.write('{"text": "more"}\n')
    grow(spool, clock)
    assert texts(ledger) == ["Ada was born in 1815.", "linked", "more"]


def test_whoever_opens_a_file_while_it_is_taken_waits_and_is_then_watched(spool, ledger, clock, monkeypatch):
    """The lease makes a writer that comes meanwhile wait for us, and tells us that it is there."""
    real = hogwild.spool_take.move
    path = spool.incoming / "a.jsonl"
    path.write_text(LINE)
    threads: list[threading.Thread] = []

    def write() -> None:
        with path.open("a") as file:
            file.write('{"text": "late"}\n')

    def opened_first(source, target, inode):
        threads.append(threading.Thread(target=write))
        threads[0].start()
        time.sleep(0.3)  # it is inside open(2) now, waiting
        return real(source, target, inode)

    monkeypatch.setattr(hogwild.spool_take, "move", opened_first)
    assert settle(spool, clock).accepted == ["a.jsonl"]
    threads[0].join(60)
    grow(spool, clock)
    assert texts(ledger) == ["Ada was born in 1815.", "late"]


def test_scp_to_a_temporary_name_and_copying_over_an_existing_file(spool, ledger, clock, tmp_path):
    (tmp_path / "source").write_text(LINE)
    shutil.copyfile(tmp_path / "source", spool.incoming / "a.jsonl")
    spool.scan_once()
    (tmp_path / "source").write_text('{"text": "second try"}\n')
    shutil.copyfile(tmp_path / "source", spool.incoming / "a.jsonl")  # before the first was taken
    assert settle(spool, clock).accepted == ["a.jsonl"]
    assert texts(ledger) == ["second try"]
