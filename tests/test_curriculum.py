import threading
import time
from collections import Counter

import pytest

from hogwild.curriculum import Curriculum
from hogwild.examples import parse_line
from hogwild.ledger import GoodLine, Ledger, Pass


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


def drop(ledger: Ledger, *lines: str, name: str = "a.jsonl", passes: int = 1) -> None:
    good = [GoodLine(i, 0, line.encode(), parse_line(line.encode())) for i, line in enumerate(lines, 1)]
    ledger.accept_file(name, f"hash of {lines}", good, passes=passes)


def texts(count: int, start: int = 0) -> list[str]:
    return [f'{{"text": "example {i}", "id": "{i}"}}' for i in range(start, start + count)]


def train(ledger: Ledger, curriculum: Curriculum, pending) -> None:
    ledger.record_pass(Pass(pending.example_id, 1.0, 0.5, 3, 1, 0, "arena"))
    curriculum.done(pending)


def order(ledger: Ledger, curriculum: Curriculum) -> list[str]:
    taken = []
    while (pending := curriculum.take(timeout=0)) is not None:
        taken.append(pending.name)
        train(ledger, curriculum, pending)
    return taken


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_passes_are_spaced_and_priority_goes_first_whatever_the_chunk(ledger, chunk):
    drop(ledger, *texts(4), '{"text": "x", "id": "urgent", "priority": 5}', passes=2)
    once = ["urgent", "0", "1", "2", "3"]
    assert order(ledger, Curriculum(ledger, chunk=chunk)) == once * 2
    assert ledger.is_idle()


def test_a_restart_continues_the_same_order(ledger):
    drop(ledger, *texts(5), passes=3)
    first = Curriculum(ledger, chunk=2)
    began = []
    for _ in range(7):
        pending = first.take(0)
        began.append(pending.name)
        train(ledger, first, pending)
    assert began + order(ledger, Curriculum(ledger)) == ["0", "1", "2", "3", "4"] * 3


def test_an_example_is_never_with_two_threads_at_once_and_gets_exactly_its_passes(ledger):
    drop(ledger, *texts(7), passes=6)
    curriculum = Curriculum(ledger, chunk=4)
    held: set[int] = set()
    seen: Counter[int] = Counter()
    lock = threading.Lock()
    clashes = []

    def work():
        while (pending := curriculum.take(timeout=0.5)) is not None:
            with lock:
                if pending.example_id in held:
                    clashes.append(pending.example_id)
                held.add(pending.example_id)
                seen[pending.example_id] += 1
            time.sleep(0.001)
            with lock:
                held.remove(pending.example_id)
            train(ledger, curriculum, pending)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not clashes
    assert set(seen.values()) == {6}
    assert len(seen) == 7


def test_what_is_given_back_comes_next(ledger):
    drop(ledger, *texts(3))
    curriculum = Curriculum(ledger)
    first = curriculum.take(0)
    assert curriculum.in_flight == 1
    curriculum.give_back(first)
    curriculum.give_back(first)  # twice does no harm
    assert curriculum.in_flight == 0
    assert order(ledger, curriculum) == ["0", "1", "2"]


def test_an_example_set_aside_is_not_offered_again(ledger):
    drop(ledger, *texts(2))
    curriculum = Curriculum(ledger)
    pending = curriculum.take(0)
    ledger.set_failed(pending.example_id, "too long")
    curriculum.done(pending)
    assert order(ledger, curriculum) == ["1"]


def test_new_examples_overtake_the_chunk_that_was_read(ledger):
    drop(ledger, *texts(10))
    curriculum = Curriculum(ledger)
    first = curriculum.take(0)
    drop(ledger, '{"text": "x", "id": "urgent", "priority": 1}', name="b.jsonl")
    curriculum.wake()
    second = curriculum.take(0)
    assert (first.name, second.name) == ("0", "urgent")
    assert curriculum.take(0).name == "1"


def test_waiters_wake_for_work_and_for_the_end(ledger):
    curriculum = Curriculum(ledger)
    taken: list[str | None] = []

    def work():
        for _ in range(2):
            pending = curriculum.take()
            taken.append(pending and pending.name)

    thread = threading.Thread(target=work)
    thread.start()
    drop(ledger, *texts(1))
    curriculum.wake()
    deadline = time.monotonic() + 30
    while not taken and time.monotonic() < deadline:
        time.sleep(0.01)
    curriculum.close()
    thread.join(30)
    assert taken == ["0", None]
    assert curriculum.take(0) is None


def test_a_waiter_gets_the_next_pass_of_the_only_example(ledger):
    drop(ledger, *texts(1), passes=2)
    curriculum = Curriculum(ledger)
    first = curriculum.take(0)
    assert curriculum.take(timeout=0) is None
    threading.Timer(0.05, train, (ledger, curriculum, first)).start()
    second = curriculum.take(timeout=30)
    assert (second.example_id, second.passes_done) == (first.example_id, 1)
