"""What goes wrong around the spool while it runs, and comes right again: events, folders, disks, permissions."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from hogwild.ledger import Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from hogwild.spool_identity import MARK
from hogwild.spool_watch import Watch
from test_permissions import place, unprivileged  # noqa: F401  # place is a fixture

LINE = '{"text": "Ada was born in 1815."}\n'


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


class Running:
    """A spool in a thread of its own, as the daemon has it."""

    def __init__(self, root: Path, ledger: Ledger, **options) -> None:
        options = {"settle_s": 0.05, "rescan_interval_s": 0.1, **options}
        self.spool = Spool(SpoolConfig(dir=root / "spool", **options), ledger, passes=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.spool.run, args=(self._stop,))

    def __enter__(self) -> Spool:
        self._thread.start()
        until((self.spool.incoming / MARK).exists)
        return self.spool

    def __exit__(self, *_) -> None:
        self._stop.set()
        self.spool.wake()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


@pytest.fixture
def heard():
    with capture_logs() as entries:
        yield lambda event: [entry for entry in entries if entry["event"] == event]


# --- events ---


@pytest.fixture
def watch(tmp_path):
    folder = tmp_path / "incoming"
    folder.mkdir()
    watch = Watch(folder)
    yield watch
    watch.close()


def hears(watch: Watch, act) -> bool:
    """Whether an event, and not the time, ends the wait after `act`."""
    watch.ensure()
    act()
    return watch.wait(60)


def threads_of(watch: Watch) -> dict[str, threading.Thread]:
    (emitter,) = watch._observer.emitters
    (reader,) = [thread for thread in watch._threads if thread not in (emitter, watch._observer)]
    return {"dispatches": watch._observer, "emits": emitter, "reads": reader}


@pytest.mark.parametrize("which", ["reads", "emits", "dispatches"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_of_the_observer_that_dies_is_noticed_and_replaced(watch, tmp_path, heard, which):
    watch.ensure()
    thread = threads_of(watch)[which]
    raised = ctypes.c_ulong(thread.ident), ctypes.py_object(MemoryError)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(*raised) == 1
    deadline = time.monotonic() + 60
    while thread.is_alive():  # it raises when it has something to do
        assert time.monotonic() < deadline
        (tmp_path / "incoming" / "a.jsonl").write_text(LINE)
        time.sleep(0.01)
    watch.ensure()
    assert [entry["reason"] for entry in heard("spool.watch_restarted")] == [f"its thread {thread.name} died"]
    assert hears(watch, lambda: (tmp_path / "incoming" / "b.jsonl").write_text(LINE))
    watch.ensure()
    assert len(heard("spool.watch_restarted")) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_in_the_handler_is_healed_too(watch, tmp_path, heard, monkeypatch):
    def fails(_event) -> None:
        raise MemoryError

    monkeypatch.setattr(watch, "hear", fails)
    watch.ensure()
    (tmp_path / "incoming" / "a.jsonl").write_text(LINE)
    until(lambda: not watch._observer.is_alive())
    monkeypatch.undo()
    assert hears(watch, lambda: (tmp_path / "incoming" / "b.jsonl").write_text(LINE))
    assert len(heard("spool.watch_restarted")) == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("renamed", "another folder is at its place"),
        ("removed", "the folder was removed"),
    ],
)
def test_a_folder_that_was_replaced_is_watched_and_it_is_said_why(watch, tmp_path, heard, how, reason):
    folder = tmp_path / "incoming"
    if how == "renamed":
        watch.ensure()
        folder.rename(tmp_path / "old")
    else:
        assert hears(watch, folder.rmdir)
    with pytest.raises(FileNotFoundError):
        watch.ensure()
    folder.mkdir()
    assert hears(watch, lambda: (folder / "a.jsonl").write_text(LINE))
    assert [entry["reason"] for entry in heard("spool.watch_restarted")] == [reason]


REMOUNTED = """
import subprocess, sys
from pathlib import Path
from hogwild.spool_watch import Watch
image, folder = Path(sys.argv[1]) / "image", Path(sys.argv[1]) / "disk"
folder.mkdir()
with image.open("wb") as file:
    file.truncate(8 << 20)
subprocess.run(["mkfs.ext4", "-q", image], check=True)
mount = ["mount", "-o", "loop", image, folder]
subprocess.run(mount, check=True)
watch = Watch(folder)
watch.ensure()
subprocess.run(["umount", folder], check=True)
subprocess.run(mount, check=True)
watch.ensure()  # the same device, the same inode, and the kernel has ended the first watch
(folder / "a.jsonl").write_text("")
assert watch.wait(60)
watch.close()
subprocess.run(["umount", folder], check=True)
"""


def test_a_disk_unmounted_and_mounted_between_two_scans_is_watched_again(tmp_path):
    command = ["unshare", "--mount", sys.executable, "-c", REMOUNTED, tmp_path]
    subprocess.run(command, check=True, timeout=300)


def test_a_wake_from_another_thread_ends_the_wait(watch):
    threading.Timer(0.05, watch.wake).start()
    assert watch.wait(60)
    assert not watch.wait(0)


def test_a_wait_that_does_not_listen_keeps_the_event_for_the_next(watch, tmp_path):
    watch.ensure()
    (tmp_path / "incoming" / "a.jsonl").write_text(LINE)
    until(lambda: not watch._observer.emitters)  # it has been heard
    assert not watch.wait(0.1, events=False)
    assert watch.wait(60)


def test_a_storm_during_a_scan_costs_a_few_events_and_not_one_a_file(watch, tmp_path, monkeypatch):
    calls = []
    heard = watch.hear
    monkeypatch.setattr(watch, "hear", lambda event: (calls.append(event), heard(event)))
    for scans in range(1, 4):
        assert hears(watch, lambda: (tmp_path / "incoming" / "first.jsonl").write_text(LINE))
        until(lambda: not watch._observer.emitters)
        for i in range(1000):
            (tmp_path / "incoming" / f"{i}.jsonl").touch()
        assert len(calls) <= 10 * scans
        assert watch._observer.event_queue.qsize() < 10


FULL = """
import sys, threading
from pathlib import Path
from hogwild import log
from hogwild.settings import SpoolConfig
from hogwild.ledger import Ledger
from hogwild.spool import Spool
log.configure("info", "json")
root, stop = Path(sys.argv[1]), threading.Event()
with Ledger(root / "ledger.sqlite") as ledger:
    spool = Spool(SpoolConfig(dir=root / "spool", settle_s=0.05, rescan_interval_s=3600), ledger, passes=1)
    threading.Thread(target=lambda: (input(), stop.set(), spool.wake())).start()
    spool.run(stop)
"""


def watches(pid: int) -> int:
    """How many inotify watches a process has."""
    found = 0
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            found += path.read_text().count("inotify wd:")
        except FileNotFoundError:
            continue  # closed since the folder was listed
    return found


def test_what_comes_while_the_event_queue_is_full_is_found(tmp_path):
    """By events alone: it would rescan after an hour. The process is stopped while the kernel's queue fills."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    incoming, done = tmp_path / "spool" / "incoming", tmp_path / "spool" / "done"
    child = subprocess.Popen(
        [sys.executable, "-c", FULL, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        until(lambda: watches(child.pid) == 1)
        child.send_signal(signal.SIGSTOP)
        for i in range(limit):  # two names in turn: the same event twice in a row counts once
            os.close(os.open(incoming / f".{i % 2}", os.O_WRONLY | os.O_CREAT))
        (incoming / "a.jsonl").write_text(LINE)
        child.send_signal(signal.SIGCONT)
        until((done / "a.jsonl").exists)
        child.communicate("\n", timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0


LIMITED = """
import sys, threading, time
from pathlib import Path
from hogwild import log
from hogwild.spool_watch import Watch
log.configure("info", "json")
folder, limit = Path(sys.argv[1]), Path("/proc/sys/user") / sys.argv[2]
allowed = limit.read_text()
limit.write_text("0")
watch = Watch(folder)
for _ in range(3):
    watch.ensure()
    assert not watch.wait(0.01)
limit.write_text(allowed)
for i in range(2):
    watch.ensure()
    (folder / f"{i}.jsonl").touch()
    assert watch.wait(60)
watch.close()
deadline = time.monotonic() + 60
while threading.active_count() > 1:  # those of earlier observers end by themselves
    assert time.monotonic() < deadline, threading.enumerate()
    time.sleep(0.01)
"""


@pytest.mark.parametrize("limit", ["max_inotify_watches", "max_inotify_instances"])
def test_what_an_inotify_limit_forbids_is_said_once_and_so_is_its_end(tmp_path, limit):
    """With limits of a user namespace of its own, which nobody else needs."""
    child = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", LIMITED, tmp_path, limit],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    said = [json.loads(line) for line in child.stdout.splitlines()]
    assert [entry["event"] for entry in said] == ["spool.unwatched", "spool.watched"]
    assert f"fs.inotify.{limit.replace('inotify', 'user')}" in said[0]["hint"]


def test_without_inotify_instances_rescans_go_on_and_events_come_back(place):  # noqa: F811
    """As a user of its own, whose limit nobody else needs."""

    def exhaust() -> str:
        libc = ctypes.CDLL(None)
        held = []
        while (fd := libc.inotify_init1(os.O_CLOEXEC)) >= 0:
            held.append(fd)
        with (
            capture_logs() as entries,
            Ledger(place / "ledger.sqlite") as ledger,
            Running(place, ledger) as spool,
        ):
            (spool.incoming / "a.jsonl").write_text(LINE)
            until(lambda: ledger.counts().files == 1)
            for fd in held:
                os.close(fd)
            until(lambda: spool._watch._observer is not None)
        return json.dumps(entries)

    said = unprivileged(exhaust, uid=54321)
    assert said.count("spool.unwatched") == 1, said
    assert "max_user_instances" in said
    assert said.count("spool.watched") == 1


# --- folders ---


def test_a_replaced_incoming_folder_and_a_vanished_spool_are_healed(tmp_path, ledger, heard):
    with Running(tmp_path, ledger) as spool:
        spool.incoming.rename(spool.incoming.with_name("old"))
        until(spool.incoming.exists)
        (spool.incoming / "a.jsonl").write_text(LINE)
        until(lambda: ledger.counts().files == 1 and not ledger.unmoved())
        spool.incoming.parent.rename(spool.incoming.parent.with_name("gone"))
        until(spool.failed.exists)
        (spool.incoming / "b.jsonl").write_text('{"text": "b"}\n')
        until(lambda: ledger.counts().files == 2 and not ledger.unmoved())
        subprocess.run(["rm", "-r", spool.incoming], check=True)
        until(spool.incoming.exists)
        (spool.incoming / "c.jsonl").write_text('{"text": "c"}\n')
        until(lambda: ledger.counts().files == 3)
    assert {entry["reason"] for entry in heard("spool.recreated")} == {"it was removed or replaced"}


def test_the_folder_of_another_spool_is_refused_until_the_right_one_is_back(tmp_path, ledger, heard):
    with Running(tmp_path, ledger) as spool:
        until((spool.incoming / MARK).exists)
        own = (spool.incoming / MARK).read_text()
        (spool.incoming / MARK).write_text("somebody else's\n")
        (spool.incoming / "a.jsonl").write_text(LINE)
        until(lambda: heard("spool.failed"))
        assert "the folder of another spool" in heard("spool.failed")[0]["error"]
        assert ledger.counts().files == 0
        (spool.incoming / MARK).write_text(own)
        until(lambda: ledger.counts().files == 1)
        until(lambda: heard("spool.healed"))
    assert len(heard("spool.failed")) == 1


def test_another_path_in_the_configuration_is_a_new_spool(tmp_path, ledger):
    for root in ("one", "two", "one"):
        spool = Spool(SpoolConfig(dir=tmp_path / root), ledger, passes=1)
        spool.prepare()
    marks = [(tmp_path / root / "incoming" / MARK).read_text() for root in ("one", "two")]
    assert len(set(marks)) == 2


UNMOUNTED = """
import json, subprocess, sys, threading, time
from pathlib import Path
from hogwild.settings import SpoolConfig
from hogwild.ledger import Ledger
from hogwild import log
from hogwild.spool import Spool
from hogwild.spool_lock import SpoolLock
log.configure("info", "json")
root, target = Path(sys.argv[1]), Path(sys.argv[2])
config = SpoolConfig(dir=root / "disk" / "spool", settle_s=0.02, rescan_interval_s=0.05)
target.mkdir(parents=True)

def mount(*options):
    subprocess.run(["mount", *options], check=True)

def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)

image = root / "image"
with image.open("wb") as file:
    file.truncate(8 << 20)
subprocess.run(["mkfs.ext4", "-q", image], check=True)
mount("-o", "loop", image, target)
with Ledger(root / "ledger.sqlite") as ledger:
    lock = SpoolLock(config.dir)
    spool = Spool(config, ledger, passes=1, hold=lock.hold, let_go=lock.let_go)
    stop = threading.Event()
    thread = threading.Thread(target=spool.run, args=(stop,))
    thread.start()
    until(spool.failed.exists)
    (spool.incoming / "a.jsonl").write_text('{"text": "a"}\\n')
    until(lambda: ledger.counts().files == 1 and not ledger.unmoved())
    assert subprocess.run(["umount", target], capture_output=True).returncode, "the daemon is at work there"
    subprocess.run(["umount", "--lazy", target], check=True)
    until(lambda: not subprocess.run(["losetup", "-j", image], capture_output=True).stdout)  # free of us
    time.sleep(1)
    assert list(target.iterdir()) == [], "it made folders under the mount point"
    spool.incoming.mkdir(parents=True)  # as a user's script would
    (spool.incoming / "lost.jsonl").write_text('{"text": "lost"}\\n')
    time.sleep(0.5)
    assert ledger.counts().files == 1
    assert (spool.incoming / "lost.jsonl").exists()
    mount("-o", "loop", image, target)
    (spool.incoming / "b.jsonl").write_text('{"text": "b"}\\n')
    until(lambda: ledger.counts().files == 2)
    stop.set()
    spool.wake()
    thread.join()
    lock.let_go()  # as the end of its process does
    subprocess.run(["umount", target], check=True)
    # It also knows when it starts while the disk is not there.
with Ledger(root / "ledger.sqlite") as ledger:
    try:
        Spool(config, ledger, passes=1).prepare()
    except Exception as error:
        print(json.dumps({"event": "refused", "error": str(error)}))
"""


@pytest.mark.parametrize("mounted", ["disk", "disk/spool"])
def test_an_unmounted_disk_is_noticed_nothing_is_made_in_its_place_and_it_heals(tmp_path, mounted):
    """A real file system on a loop device, in a mount namespace of its own: nothing is left behind."""
    child = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", UNMOUNTED, tmp_path, tmp_path / mounted],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr
    said = [json.loads(line) for line in child.stdout.splitlines()]
    events = [entry["event"] for entry in said]
    assert events.count("spool.failed") == 1
    assert events.count("spool.healed") == 1
    failed = next(entry for entry in said if entry["event"] == "spool.failed")
    assert "is it not mounted?" in failed["error"]
    assert events[-1] == "refused"
    assert "is it not mounted?" in said[-1]["error"]


APART = """
import subprocess, sys
from pathlib import Path
from hogwild.settings import SpoolConfig
from hogwild.ledger import Ledger
from hogwild.spool import Spool
root = Path(sys.argv[1])
(root / "spool" / "incoming").mkdir(parents=True)
subprocess.run(["mount", "-t", "tmpfs", "none", root / "spool" / "incoming"], check=True)
with Ledger(root / "ledger.sqlite") as ledger:
    Spool(SpoolConfig(dir=root / "spool"), ledger, passes=1).prepare()
"""


def test_folders_on_two_file_systems_are_refused_because_files_could_not_be_moved(tmp_path):
    child = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", APART, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"{tmp_path}/spool/done: is on another file system than {tmp_path}/spool/incoming" in child.stderr


# --- permissions ---


def test_a_folder_that_becomes_unreadable_is_named_once_and_heals(place):  # noqa: F811
    def work() -> str:
        with (
            capture_logs() as entries,
            Ledger(place / "ledger.sqlite") as ledger,
            Running(place, ledger) as spool,
        ):
            for mode in (0o000, 0o500):
                (spool.incoming / f"{mode}.jsonl.tmp").write_text(f'{{"text": "{mode}"}}\n')
                spool.incoming.chmod(mode)
                time.sleep(0.5)
                spool.incoming.chmod(0o700)
                until(lambda: "" not in spool._said)
                (spool.incoming / f"{mode}.jsonl.tmp").rename(spool.incoming / f"{mode}.jsonl")
            until(lambda: ledger.counts().files == 2)
        return json.dumps(entries)

    said = json.loads(unprivileged(work))
    failed = [entry for entry in said if entry["event"] == "spool.failed"]
    assert 2 <= len(failed) <= 4  # not with every scan
    for entry in failed:
        assert f"{place}/spool/incoming" in entry["error"], entry
        assert entry["user"] == "nobody"
    assert [entry["event"] for entry in said].count("spool.healed") == 2


def test_a_file_that_breaks_the_reader_is_named_once_and_the_others_go_on(
    tmp_path, ledger, heard, monkeypatch
):
    """A bug of ours must not stop the service again and again on the same file."""
    import hogwild.spool_read as module

    real = module.parse_lines

    def broken(chunks, limit):
        if b"poison" in chunks[0]:
            raise RecursionError("as a bug would")
        return real(chunks, limit)

    monkeypatch.setattr(module, "parse_lines", broken)
    with Running(tmp_path, ledger) as spool:
        (spool.incoming / "a.jsonl").write_text('{"text": "poison"}\n')
        (spool.incoming / "b.jsonl").write_text(LINE)
        until(lambda: ledger.counts().files == 1)
        until(lambda: heard("spool.stuck"))
        time.sleep(0.5)
        assert len(heard("spool.stuck")) == 1
        assert heard("spool.stuck")[0]["path"] == str(spool.incoming / "a.jsonl")
        monkeypatch.undo()
        until(lambda: ledger.counts().files == 2)


def test_done_that_cannot_be_written_keeps_files_where_they_are_and_doubles_nothing(place):  # noqa: F811
    def work() -> str:
        with (
            capture_logs() as entries,
            Ledger(place / "ledger.sqlite") as ledger,
            Running(place, ledger) as spool,
        ):
            spool.done.chmod(0o500)
            (spool.incoming / ".a.jsonl").write_text(LINE)
            (spool.incoming / ".a.jsonl").rename(spool.incoming / "a.jsonl")
            time.sleep(0.5)
            spool.done.chmod(0o700)
            until(lambda: (spool.done / "a.jsonl").exists() and not ledger.unmoved())
            assert ledger.counts().pending == 1
        return json.dumps(entries)

    said = json.loads(unprivileged(work))
    named = [entry for entry in said if entry["event"] in ("spool.failed", "spool.unreadable")]
    assert named
    assert all(entry["user"] == "nobody" and f"{place}/spool/done" in str(entry) for entry in named)
