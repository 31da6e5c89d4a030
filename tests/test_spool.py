import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zstandard

from hogwild.ledger import Ledger
from hogwild.lines import split_lines
from hogwild.settings import SpoolConfig
from hogwild.spool import Scan, Spool
from hogwild.spool_identity import MARK
from hogwild.spool_watch import Watch

LINE = '{"text": "Ada was born in 1815."}\n'


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


@pytest.fixture
def spool(tmp_path, ledger, clock):
    spool = Spool(SpoolConfig(dir=tmp_path / "spool", max_line_bytes=4096), ledger, passes=2, clock=clock)
    spool.prepare()
    return spool


def settle(spool: Spool, clock: Clock) -> Scan:
    spool.scan_once()
    clock.now += 100
    return spool.scan_once()


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != MARK}


def errors(spool: Spool, name: str) -> list[dict]:
    return [json.loads(line) for line in (spool.failed / f"{name}.errors.jsonl").read_text().splitlines()]


# --- what becomes of a file ---


def test_good_lines_train_and_bad_ones_are_written_down(spool, ledger, clock):
    bad = '{"txt": 1}\n'
    (spool.incoming / "a.jsonl").write_text(LINE + "\n" + bad + '{"text": "b"}\n' + "{")
    assert settle(spool, clock).accepted == ["a.jsonl"]
    assert names(spool.incoming) == set()
    assert (spool.done / "a.jsonl").exists()
    first, last = errors(spool, "a.jsonl")
    assert first == {
        "file": "a.jsonl",
        "line": 3,
        "offset": len(LINE) + 1,
        "field": "txt",
        "reason": "unknown field; did you mean `text`?",
        "excerpt": bad.strip(),
    }
    assert last["line"] == 5
    assert [(p.line_no, p.passes) for p in ledger.pending(9)] == [(1, 2), (4, 2)]


def test_a_file_without_a_good_line_fails(spool, ledger, clock):
    (spool.incoming / "bad.jsonl").write_text("nope\n")
    (spool.incoming / "empty.jsonl").write_text("")
    (spool.incoming / "blank.jsonl").write_text(" \n\r\n")
    scan = settle(spool, clock)
    assert sorted(scan.rejected) == ["bad.jsonl", "blank.jsonl", "empty.jsonl"]
    assert names(spool.failed) == {
        f"{x}.jsonl{y}" for x in ("bad", "empty", "blank") for y in ("", ".errors.jsonl")
    }
    assert errors(spool, "empty.jsonl")[0]["reason"] == "the file is empty"
    assert ledger.is_idle()


def compress_twice(text: str) -> bytes:
    """Two frames, as `zstd` makes of two files concatenated."""
    half = len(text) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part.encode()) for part in (text[:half], text[half:]))


def test_compressed_files_are_read_and_cut_off_ones_refused_whole(spool, ledger, clock):
    text = "".join(f'{{"text": "number {i} {os.urandom(20).hex()}"}}\n' for i in range(2000))
    packed = {
        "a.jsonl.gz": gzip.compress(text.encode()),
        "b.jsonl.zst": compress_twice(text.replace("number", "no")),
    }
    for name, data in packed.items():
        (spool.incoming / name).write_bytes(data)
        (spool.incoming / f"cut-{name}").write_bytes(data[:-20])
    (spool.incoming / "not.jsonl.gz").write_text(LINE)
    (spool.incoming / "not.jsonl.zst").write_text(LINE)
    scan = settle(spool, clock)
    assert sorted(scan.accepted) == sorted(packed)
    assert len(scan.rejected) == 4
    assert ledger.counts().pending == 4000
    assert "cannot be decompressed" in errors(spool, "cut-b.jsonl.zst")[0]["reason"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_bomb_is_one_bad_line_in_bounded_memory(spool, ledger, clock, pack):
    import tracemalloc

    name = "bomb.jsonl.gz" if pack is gzip.compress else "bomb.jsonl.zst"
    data = pack(b"x" * 200_000_000 + b"\n" + LINE.encode())
    (spool.incoming / name).write_bytes(data)
    tracemalloc.start()
    assert settle(spool, clock).accepted == [name]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000
    assert "longer than spool.max_line_bytes" in errors(spool, name)[0]["reason"]
    assert ledger.pending(1)[0].line_no == 2


def test_the_same_content_is_not_learned_twice_whatever_its_name(spool, ledger, clock):
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    (spool.incoming / "a.jsonl").write_text(LINE)
    (spool.incoming / "b.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    assert sorted(settle(spool, clock).duplicates) == ["a.jsonl", "b.jsonl.gz"]
    assert ledger.counts().pending == 1
    assert len(names(spool.done)) == 3
    (spool.incoming / "a.force.jsonl").write_text(LINE)
    assert settle(spool, clock).accepted == ["a.force.jsonl"]
    assert ledger.counts().pending == 2


def test_files_of_one_name_do_not_overwrite_each_other(spool, clock):
    for i in range(4):
        (spool.incoming / "facts.jsonl").write_text(f'{{"text": "fact {i}"}}\n')
        settle(spool, clock)
    (spool.incoming / "facts.jsonl").write_text("bad\n")
    settle(spool, clock)
    done = [path.read_text() for path in spool.done.iterdir()]
    assert sorted(done) == [f'{{"text": "fact {i}"}}\n' for i in range(4)]
    assert [path.read_text() for path in spool.failed.iterdir() if "errors" not in path.name] == ["bad\n"]


def test_a_file_that_is_dropped_every_minute_for_months_is_put_away_as_quickly_as_ever(
    spool, ledger, clock, monkeypatch
):
    """A cron job that knows no better: each time its name is taken once more. It used to be looked for from 1 on."""
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    (spool.incoming / "a.jsonl").write_text(LINE)
    settle(spool, clock)
    (first,) = names(spool.done) - {"a.jsonl"}
    stem = first.removesuffix(".jsonl")
    for number in range(2, 2001):  # as if it had come so often
        (spool.done / f"{stem}.{number}.jsonl").write_text(LINE)
    looks = 0

    def look(path, exists=os.path.lexists):
        nonlocal looks
        looks += 1
        return exists(path)

    monkeypatch.setattr(os.path, "lexists", look)
    before = names(spool.done)
    for _ in range(3):
        (spool.incoming / "a.jsonl").write_text(LINE)
        assert settle(spool, clock).duplicates == ["a.jsonl"]
    assert names(spool.done) - before == {f"{stem}.{number}.jsonl" for number in (2001, 2002, 2003)}
    assert looks < 3 * 100
    assert ledger.counts().files == 1


def test_what_is_not_a_spool_file_is_never_opened(spool, clock, tmp_path, capsys):
    outside = tmp_path / "secret.jsonl"
    outside.write_text(LINE)
    (spool.incoming / ".hidden.jsonl").write_text(LINE)
    (spool.incoming / "part.jsonl.tmp").write_text(LINE)
    (spool.incoming / "notes.txt").write_text(LINE)
    (spool.incoming / "link.jsonl").symlink_to(outside)
    (spool.incoming / "folder.jsonl").mkdir()
    os.mkfifo(spool.incoming / "pipe.jsonl")
    before = names(spool.incoming)
    settle(spool, clock)
    assert settle(spool, clock) == Scan()
    assert names(spool.incoming) == before
    said = capsys.readouterr().out
    assert said.count("spool.ignored") == 4  # once each, and nothing about hidden and temporary files


# --- complete, and not before ---


def test_a_file_is_read_once_it_has_stopped_changing(spool, clock):
    path = spool.incoming / "a.jsonl"
    path.write_text(LINE)
    for i in range(5):
        clock.now += 0.9
        assert spool.scan_once().waiting == ["a.jsonl"]
        path.write_text(path.read_text() + f'{{"text": "more {i}"}}\n')
    spool.scan_once()
    clock.now += 1.0
    assert spool.scan_once().accepted == ["a.jsonl"]
    assert len(spool.scan_once().waiting) == 0


@pytest.mark.parametrize("text", ["", LINE + '{"text": "cut in the mid'])
def test_an_unfinished_file_is_given_more_time(spool, clock, text):
    path = spool.incoming / "a.jsonl"
    path.write_text(text)
    spool.scan_once()
    clock.now += 2
    assert spool.scan_once().waiting == ["a.jsonl"]
    path.write_text(LINE)
    assert settle(spool, clock).accepted == ["a.jsonl"]


def test_a_file_that_somebody_has_open_for_writing_is_not_complete(spool, clock):
    path = spool.incoming / "slow.jsonl"
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"f = open({str(path)!r}, 'w', 1); f.write({LINE!r}); print(flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline()
    assert settle(spool, clock).waiting == ["slow.jsonl"]
    writer.communicate(b"\n", timeout=60)
    assert spool.scan_once().accepted == ["slow.jsonl"]


def test_a_file_replaced_while_it_is_taken_is_not_mistaken_for_the_old_one(spool, ledger, clock, monkeypatch):
    import hogwild.spool_take as module

    (spool.incoming / "a.jsonl").write_text(LINE)

    def replaced_first(source, target, inode):
        monkeypatch.undo()
        (spool.incoming / ".new").write_text('{"text": "new"}\n')
        (spool.incoming / ".new").replace(source)
        return module.move(source, target, inode)

    monkeypatch.setattr(module, "move", replaced_first)
    settle(spool, clock)
    assert (spool.incoming / "a.jsonl").read_text() == '{"text": "new"}\n'
    settle(spool, clock)
    assert sorted(p.line for p in ledger.pending(9)) == sorted([LINE.strip(), '{"text": "new"}'])


@pytest.mark.parametrize("lines", [1, 40_000])
def test_a_file_written_while_it_is_read_is_read_again(spool, ledger, clock, monkeypatch, lines):
    import hogwild.spool_read as module

    path = spool.incoming / "a.jsonl"
    path.write_text("".join(f'{{"text": "line {i} of a small or a large file"}}\n' for i in range(lines)))
    name = "parse_lines" if lines == 1 else "read_lines"
    real = getattr(module, name)

    def written_meanwhile(*args):
        yield from real(*args)
        with path.open("a") as file:
            file.write('{"text": "late"}\n')

    # The lease would make that writer wait: this is about files where there is none.
    monkeypatch.setattr(module, "take_lease", lambda _fd: module.Lease.UNKNOWN)
    monkeypatch.setattr(module, name, written_meanwhile)
    assert settle(spool, clock).waiting == ["a.jsonl"]
    assert ledger.counts().files == 0
    monkeypatch.undo()
    assert settle(spool, clock).accepted == ["a.jsonl"]
    assert ledger.counts().pending == lines + 1


# --- crashes ---

KILLED = """
import os, signal, sys
from pathlib import Path
import hogwild.spool_take as module
from hogwild.settings import SpoolConfig
from hogwild.ledger import Ledger
from hogwild.spool import Spool
root = Path(sys.argv[1])
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
setattr({"ledger": Ledger, "spool": module}[sys.argv[2]], sys.argv[3], die)
spool = Spool(SpoolConfig(dir=root / "spool", settle_s=0), Ledger(root / "ledger.sqlite"), passes=1)
spool.prepare()
spool.scan_once()
"""


@pytest.mark.parametrize(
    ("owner", "function"),
    [
        ("spool", "write_errors_file"),
        ("spool", "move"),
        ("ledger", "set_moved"),
        ("spool", "fsync_folder"),
    ],
)
def test_kill_9_between_accepting_and_moving_loses_and_doubles_nothing(tmp_path, owner, function):
    incoming = tmp_path / "spool" / "incoming"
    incoming.mkdir(parents=True)
    (incoming / "a.jsonl").write_text(LINE + "bad\n")
    (incoming / "bad.jsonl").write_text("worse\n")
    for life in range(2):  # in the second one, recovery is killed, if there is anything left to recover
        child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), owner, function], timeout=60)
        assert child.returncode in ([-signal.SIGKILL], [-signal.SIGKILL, 0])[life]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=tmp_path / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        spool.scan_once()
        assert [p.line for p in ledger.pending(9)] == [LINE.strip()]
        assert ledger.counts().files == 2
        assert ledger.unmoved() == []
        assert names(spool.incoming) == set()
        assert names(spool.done) == {"a.jsonl"}
        assert names(spool.failed) == {"a.jsonl.errors.jsonl", "bad.jsonl", "bad.jsonl.errors.jsonl"}


# --- the running spool: real events, real threads ---


@pytest.fixture
def start(tmp_path, ledger):
    running: list[tuple[Spool, threading.Event, threading.Thread]] = []

    def start(**options) -> Spool:
        config = SpoolConfig(dir=tmp_path / "spool", settle_s=0.05, **options)
        spool = Spool(config, ledger, passes=1)
        stop = threading.Event()
        thread = threading.Thread(target=spool.run, args=(stop,))
        thread.start()
        running.append((spool, stop, thread))
        until(spool.failed.exists)
        return spool

    yield start
    for spool, stop, thread in running:
        stop.set()
        spool.wake()
        thread.join(30)
        assert not thread.is_alive()


def test_every_way_a_file_arrives_is_noticed_by_events_alone(start, ledger, tmp_path):
    spool = start(rescan_interval_s=3600)
    arrived = 0

    def text() -> str:
        nonlocal arrived
        arrived += 1
        return f'{{"text": "{arrived}"}}\n'

    def accepted() -> bool:
        return ledger.counts().files == arrived and not names(spool.incoming)

    # The first scan may still be under way, but from here on nothing rescans for an hour.
    (tmp_path / "outside.jsonl").write_text(text())
    (tmp_path / "outside.jsonl").rename(spool.incoming / "renamed-in.jsonl")
    until(accepted)
    (spool.incoming / ".part").write_text(text())
    (spool.incoming / ".part").rename(spool.incoming / "renamed-within.jsonl")
    until(accepted)
    (tmp_path / "linked").write_text(text())
    os.link(tmp_path / "linked", spool.incoming / "linked.jsonl")
    until(accepted)
    (tmp_path / "copied").write_text(text())
    subprocess.run(["cp", tmp_path / "copied", spool.incoming / "copied.jsonl"], check=True)
    until(accepted)
    with (spool.incoming / "slow.jsonl").open("w") as file:
        for part in text():
            file.write(part)
            file.flush()
            time.sleep(0.005)
    until(accepted)
    assert ledger.counts().rejected == 0


def test_without_any_events_rescans_find_everything(start, ledger, monkeypatch):
    monkeypatch.setattr(Watch, "ensure", lambda _self: None)
    spool = start(rescan_interval_s=0.05)
    for i in range(20):
        (spool.incoming / f"{i}.jsonl").write_text(f'{{"text": "{i}"}}\n')
    until(lambda: ledger.counts().files == 20)


def test_trainers_are_told_after_the_examples_are_in(tmp_path, ledger):
    told = []
    config = SpoolConfig(dir=tmp_path / "spool", settle_s=0)
    spool = Spool(
        config, ledger, passes=1, on_accepted=lambda record: told.append((record.examples, ledger.is_idle()))
    )
    spool.prepare()
    (spool.incoming / "a.jsonl").write_text(LINE)
    (spool.incoming / "bad.jsonl").write_text("x\n")
    spool.scan_once()
    assert told == [(1, False)]


# --- lines ---


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_are_the_same_however_the_content_is_cut(size):
    content = b"\xef\xbb\xbfone\ntwo\r\n\n" + b"x" * 50 + b"\nlast"
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert list(split_lines(chunks, 10)) == [
        (1, 0, b"one", 6),
        (2, 7, b"two\r", 4),
        (3, 12, b"", 0),
        (4, 13, b"x" * 10, 50),
        (5, 64, b"last", 4),
    ]


def test_the_intake_imports_neither_torch_nor_a_tokenizer():
    modules = "check config curriculum encoding errors examples ledger lines log spool".split()  # noqa: SIM905
    script = (
        f"import sys, importlib; [importlib.import_module('hogwild.' + m) for m in {modules}]; "
        "print({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert child.stdout == "set()\n", child.stderr
