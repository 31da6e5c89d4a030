"""Whatever is in a spool file: no crash, no hang, bounded memory, and exactly one reason for each line refused."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hostile
from hogwild.errors import ExampleError
from hogwild.examples import parse_line
from hogwild.ledger import GoodLine, Ledger
from hogwild.lines import parse_lines
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool
from test_spool import Clock, errors, settle

LIMIT = 4096


@pytest.mark.timeout(60)  # the slowest takes well under a second
@pytest.mark.parametrize("name", hostile.REFUSED)
def test_a_hostile_line_is_refused_with_one_short_reason(name):
    with pytest.raises(ExampleError) as caught:
        parse_line(hostile.REFUSED[name])
    assert 0 < len(caught.value.reason) < 400
    assert "\n" not in caught.value.reason
    assert caught.value.field is None or len(caught.value.field) < 200
    json.dumps([caught.value.reason, caught.value.field]).encode("utf-8", "strict")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", hostile.ACCEPTED)
def test_an_odd_line_that_is_valid_is_kept_to_the_letter(name):
    line = hostile.ACCEPTED[name]
    example, data = parse_line(line), json.loads(line)
    assert example.text == data.get("text")
    assert example.messages == (tuple(data["messages"]) if "messages" in data else None)
    assert example.id == (str(data["id"]) if "id" in data else None)


def test_all_of_it_in_one_file_goes_through_spool_and_ledger(tmp_path):
    """What is refused is in the errors file, what is accepted in the ledger, byte for byte."""
    lines = list(hostile.file())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        clock = Clock()
        spool = Spool(
            SpoolConfig(dir=tmp_path / "spool", max_line_bytes=2**21), ledger, passes=1, clock=clock
        )
        spool.prepare()
        content = b"".join(line + b"\n" for _, line in lines)
        (spool.incoming / "hostile.jsonl").write_bytes(content)
        assert settle(spool, clock).accepted == ["hostile.jsonl"]
        found = {error["line"]: error for error in errors(spool, "hostile.jsonl")}
        kept = {pending.line_no: pending for pending in ledger.pending(10_000)}
    for line_no, (name, line) in enumerate(lines, 1):
        if name in hostile.ACCEPTED:
            assert kept.pop(line_no).line.encode() == line, name
        else:
            error = found.pop(line_no)
            assert content[error["offset"] :].startswith(line), name
            assert error["reason"], name
            assert len(error["excerpt"].encode()) <= 700, name
    assert not kept
    assert not found


def test_a_small_file_and_a_large_one_are_read_alike(tmp_path):
    """Small files go in batches, large ones are streamed; an id may hold a NUL, which SQLite's JSON would cut."""
    line = hostile.ACCEPTED["an escaped NUL"]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=tmp_path / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        (spool.incoming / "small.jsonl").write_bytes(line + b"\n")
        (spool.incoming / "large.jsonl").write_bytes(line + b"\n" + b" " * 2_000_000 + b"\n")
        spool.scan_once()
        assert [(p.name, p.line.encode()) for p in ledger.pending(9)] == [("\0", line)] * 2


@pytest.mark.timeout(120)
def test_a_line_of_100_mb_is_one_reason_in_bounded_memory(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=tmp_path / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        with (spool.incoming / "long.jsonl").open("wb") as file:
            file.write(b'{"text": "')
            for _ in range(100):
                file.write(b"[" * 1_000_000)
            file.write(b'"}\n{"text": "good"}\n')
        tracemalloc.start()
        assert spool.scan_once().accepted == ["long.jsonl"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40_000_000  # twice spool.max_line_bytes, and what is read at once
        (error,) = errors(spool, "long.jsonl")
        assert error["reason"] == "longer than spool.max_line_bytes (8388608)"
        assert [pending.line_no for pending in ledger.pending(9)] == [2]


pieces = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"\n", b"\r\n", b"\n\n", b" \t\n", b"\xef\xbb\xbf", b"\x00", b"{", b"}", b"[", b'"', b"\\u"]
    ),
    st.sampled_from(
        [line for line in [*hostile.REFUSED.values(), *hostile.ACCEPTED.values()] if len(line) < 300]
    ),
    st.sampled_from([line[:-1] for line in hostile.ACCEPTED.values() if len(line) < 300]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=12).map(b"".join), st.integers(1, 50))
def test_any_content_is_split_into_lines_of_one_outcome_each_wherever_it_is_cut(content, size):
    whole = list(parse_lines([content], LIMIT))
    cut = [content[i : i + size] for i in range(0, len(content), size)]
    assert list(parse_lines(cut, LIMIT)) == whole
    expected = [no for no, line in enumerate(content.split(b"\n"), 1) if line.strip(b" \t\r")]
    if content.startswith(b"\xef\xbb\xbf") and not content.split(b"\n")[0][3:].strip(b" \t\r"):
        expected = [no for no in expected if no > 1]  # a byte order mark alone is an empty line
    assert [line.line_no for line in whole] == (expected or [0])
    starts = [0]
    for line in content.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for line in whole:
        assert line.byte_offset == starts[max(line.line_no, 1) - 1]
        if isinstance(line, GoodLine):
            assert line.raw in content
        else:
            assert line.reason


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*hostile.REFUSED.values(), *hostile.ACCEPTED.values()]), st.data())
def test_a_hostile_line_with_bytes_changed_is_an_example_or_one_reason(line, data):
    changed = bytearray(line[:2000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(changed) - 1)))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (outcome,) = parse_lines([bytes(changed).replace(b"\n", b" ")], LIMIT)
    assert isinstance(outcome, GoodLine) or 0 < len(outcome.reason) < 400
