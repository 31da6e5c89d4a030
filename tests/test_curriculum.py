"""Which example comes next, and what is replayed beside it, on a real ledger."""

import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch

from hogwild.curriculum import Batch, Curriculum
from hogwild.examples import parse_line
from hogwild.ledger import GoodLine, Ledger, Pass
from hogwild.likeliest import Likeliest
from hogwild.selfreplay import Sample
from hogwild.settings import ReplayConfig

ALONE = ReplayConfig(ratio=0.0)
OWN = [Sample((1, 5 + i), 1, Likeliest(torch.tensor([[5]]), torch.tensor([[-0.5]]))) for i in range(6)]


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


def drop(ledger: Ledger, *lines: str, name: str = "a.jsonl", passes: int = 1) -> None:
    good = [GoodLine(i, 0, line.encode(), parse_line(line.encode())) for i, line in enumerate(lines, 1)]
    ledger.accept_file(name, f"hash of {lines}", good, passes=passes)


def texts(count: int, start: int = 0, extra: str = "") -> list[str]:
    return [f'{{"text": "example {i}", "id": "{i}"{extra}}}' for i in range(start, start + count)]


def train(ledger: Ledger, curriculum: Curriculum, batch: Batch, step: int = 1, **losses: float) -> None:
    """Record what a trainer would: every example's loss is 0.5, or what `losses` has under its name."""
    for one in [*batch.new, *batch.replayed]:
        loss = losses.get(f"_{one.name}", 0.5)
        ledger.record_passes(
            [Pass(one.example_id, loss, loss, 3, step, 0, "arena", replay=one in batch.replayed)]
        )
    curriculum.done(batch)
    for one in batch.replayed:
        curriculum.forgotten(one, losses.get(f"_{one.name}", 0.5))


def order(ledger: Ledger, curriculum: Curriculum) -> list[str]:
    """Names of the new examples until nothing is left; without replay, one a step."""
    return [name for names, _, _ in steps(ledger, curriculum) for name in names]


def steps(ledger: Ledger, curriculum: Curriculum, first: int = 0, count: int = 10**6, **losses: float):
    """What each step was made of: names of the new, names of the replayed, number of the model's own texts."""
    made = []
    for step in range(first, first + count):
        batch = curriculum.take(timeout=0, step=step)
        if batch is None:
            break
        made.append(([one.name for one in batch.new], [one.name for one in batch.replayed], len(batch.own)))
        train(ledger, curriculum, batch, step + 1, **losses)
    return made


# --- new examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_passes_are_spaced_and_priority_goes_first_whatever_the_chunk(ledger, chunk):
    drop(ledger, *texts(4), '{"text": "x", "id": "urgent", "priority": 5}', passes=2)
    once = ["urgent", "0", "1", "2", "3"]
    assert order(ledger, Curriculum(ledger, ALONE, chunk=chunk)) == once * 2
    assert ledger.is_idle()


def test_a_restart_continues_the_same_order(ledger):
    drop(ledger, *texts(5), passes=3)
    began = [
        name for names, _, _ in steps(ledger, Curriculum(ledger, ALONE, chunk=2), count=7) for name in names
    ]
    assert began + order(ledger, Curriculum(ledger, ALONE)) == ["0", "1", "2", "3", "4"] * 3


def test_an_example_is_never_with_two_threads_at_once_and_gets_exactly_its_passes(ledger):
    drop(ledger, *texts(7), passes=6)
    curriculum = Curriculum(ledger, chunk=4)
    held: set[int] = set()
    seen: Counter[int] = Counter()
    lock = threading.Lock()
    clashes = []

    def work():
        while (batch := curriculum.take(timeout=0.5)) is not None:
            with lock:
                for one in batch.new:
                    if one.example_id in held:
                        clashes.append(one.example_id)
                    held.add(one.example_id)
                    seen[one.example_id] += 1
            time.sleep(0.001)
            with lock:
                held.difference_update(one.example_id for one in batch.new)
            train(ledger, curriculum, batch)

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
    curriculum = Curriculum(ledger, ALONE)
    first = curriculum.take(0)
    assert curriculum.in_flight == 1
    curriculum.give_back(first)
    curriculum.give_back(first)  # twice does no harm
    assert curriculum.in_flight == 0
    assert order(ledger, curriculum) == ["0", "1", "2"]


def test_an_example_set_aside_is_not_offered_again(ledger):
    drop(ledger, *texts(2))
    curriculum = Curriculum(ledger, ALONE)
    batch = curriculum.take(0)
    ledger.set_failed(batch.new[0].example_id, "too long")
    curriculum.done(batch)
    assert order(ledger, curriculum) == ["1"]


def test_new_examples_overtake_the_chunk_that_was_read(ledger):
    drop(ledger, *texts(10))
    curriculum = Curriculum(ledger, ALONE)
    first = curriculum.take(0)
    drop(ledger, '{"text": "x", "id": "urgent", "priority": 1}', name="b.jsonl")
    curriculum.wake()
    second = curriculum.take(0)
    assert (first.new[0].name, second.new[0].name) == ("0", "urgent")
    assert curriculum.take(0).new[0].name == "1"


def test_waiters_wake_for_work_and_for_the_end(ledger):
    curriculum = Curriculum(ledger)
    taken: list[str | None] = []

    def work():
        for _ in range(2):
            batch = curriculum.take()
            taken.append(batch and batch.new[0].name)

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
    assert [(one.example_id, one.passes_done) for one in second.new] == [(first.new[0].example_id, 1)]


def test_several_new_examples_share_a_step_under_a_budget_of_tokens(ledger):
    drop(ledger, *texts(5), '{"text": "%s", "id": "long"}' % ("x" * 400))
    size = len(texts(1)[0]) // 4 + 1
    made = steps(ledger, Curriculum(ledger, ALONE, step_tokens=2 * size + 1))
    assert [names for names, _, _ in made] == [["0", "1"], ["2", "3"], ["4"], ["long"]]


def test_a_step_never_holds_an_example_twice_or_passes_of_different_rounds(ledger):
    drop(ledger, *texts(3), passes=2)
    made = steps(ledger, Curriculum(ledger, ReplayConfig(ratio=0), step_tokens=10_000))
    assert [names for names, _, _ in made] == [["0", "1", "2"]] * 2


# --- spacing ----------------------------------------------------------------------------------------------


def test_a_single_example_gets_its_passes_with_replay_in_between(ledger):
    drop(ledger, *texts(6, start=100), name="old.jsonl")
    curriculum = Curriculum(ledger, ReplayConfig())
    before = len(steps(ledger, curriculum))
    drop(ledger, *texts(1), passes=3, name="one.jsonl")
    curriculum.wake()
    made = steps(ledger, curriculum, first=before)
    assert [names for names, _, _ in made] == [["0"], [], ["0"], [], ["0"]]
    assert all(old and "0" not in old for _, old, _ in made)


def test_a_single_first_example_is_spaced_by_the_models_own_texts(ledger):
    drop(ledger, *texts(1), passes=3)
    curriculum = Curriculum(ledger)
    curriculum.replay.own = OWN
    assert steps(ledger, curriculum) == [
        (["0"], [], 1),
        ([], [], 1),
        (["0"], [], 1),
        ([], [], 1),
        (["0"], [], 1),
    ]


def test_with_nothing_to_replay_a_single_example_goes_back_to_back(ledger):
    drop(ledger, *texts(1), passes=3)
    assert steps(ledger, Curriculum(ledger)) == [(["0"], [], 0)] * 3


# --- replay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0, 1.5])
def test_every_step_mixes_in_its_share_of_replay(ledger, ratio):
    drop(ledger, *texts(30), name="old.jsonl")
    curriculum = Curriculum(ledger, ReplayConfig(ratio=ratio))
    done = len(steps(ledger, curriculum))
    drop(ledger, *texts(40, start=30), name="new.jsonl")
    curriculum.wake()
    made = steps(ledger, curriculum, first=done)
    assert [len(names) for names, _, _ in made] == [1] * 40
    assert abs(sum(len(old) for _, old, _ in made) - ratio * 40) <= 1
    assert all(len(set(old)) == len(old) for _, old, _ in made)


def test_replay_changes_no_state_and_no_count(ledger):
    drop(ledger, *texts(4), name="old.jsonl")
    curriculum = Curriculum(ledger)
    steps(ledger, curriculum)
    marker = ledger.begin_checkpoint()
    ledger.complete_checkpoint(marker, 4, "somewhere")
    before = ledger.counts()
    drop(ledger, *texts(6, start=4), name="new.jsonl")
    curriculum.wake()
    replayed = [name for _, old, _ in steps(ledger, curriculum, first=4) for name in old]
    assert len(replayed) == 6
    after = ledger.counts()
    assert (after.durable, after.trained, after.passes) == (before.durable, 6, before.passes + 6)
    # Passes that are lost are those of the new examples alone: what was replayed stays durable.
    reset = ledger.reset_to_durable()
    assert reset.examples_reopened == 6
    assert (ledger.counts().durable, ledger.counts().pending) == (4, 6)


def test_a_rollback_undoes_no_example_because_it_was_replayed(ledger):
    drop(ledger, *texts(3), name="old.jsonl")
    curriculum = Curriculum(ledger)
    steps(ledger, curriculum)
    marker = ledger.begin_checkpoint()
    ledger.complete_checkpoint(marker, 3, "somewhere")
    drop(ledger, *texts(5, start=3), name="new.jsonl")
    curriculum.wake()
    steps(ledger, curriculum, first=3)
    assert ledger.roll_back(marker, retrain=False).examples_undone == 5
    drop(ledger, *texts(12, start=50), name="next.jsonl")
    curriculum.wake()
    replayed = {name for _, old, _ in steps(ledger, curriculum, first=8) for name in old}
    assert replayed
    assert not replayed & {str(i) for i in range(3, 8)}  # what was undone is never replayed


def test_unlearning_and_failed_examples_are_never_replayed(ledger):
    drop(
        ledger, *texts(5), *texts(5, start=5, extra=', "weight": -0.5'), *texts(1, start=99), name="old.jsonl"
    )
    curriculum = Curriculum(ledger)
    steps(ledger, curriculum)
    ledger.set_failed(11, "too long")
    drop(ledger, *texts(60, start=100), name="new.jsonl")
    curriculum.wake()
    old = {name for _, old, _ in steps(ledger, curriculum, first=11) for name in old}
    assert {str(i) for i in range(5)} <= old
    assert not old & {*(str(i) for i in range(5, 10)), "99"}


def test_replay_is_diverse_across_files_and_tags(ledger):
    drop(ledger, *texts(500, extra=', "tags": ["big"]'), name="big.jsonl")
    for i in range(5):
        drop(ledger, *texts(3, start=1000 + 3 * i, extra=f', "tags": ["small{i}"]'), name=f"small{i}.jsonl")
    curriculum = Curriculum(ledger, ReplayConfig(difficulty=0))
    done = len(steps(ledger, curriculum))
    drop(ledger, *texts(120, start=2000), name="new.jsonl")
    curriculum.wake()
    replayed = [old[0] for _, old, _ in steps(ledger, curriculum, first=done)]
    small = [name for name in replayed if 1000 <= int(name) < 1015]
    assert (
        len(small) > len(replayed) / 4
    )  # 15 of 515 examples; each of five files and tags counts like the big one
    assert len({(int(name) - 1000) // 3 for name in small}) == 5
    assert len(set(replayed)) > len(replayed) / 3
    assert any(int(name) < 500 for name in replayed)


def test_what_is_hard_is_replayed_more_often(ledger):
    drop(ledger, *texts(20), name="old.jsonl")
    losses = {f"_{i}": 2.0 if i < 4 else 0.1 for i in range(20)}
    curriculum = Curriculum(ledger, ReplayConfig(difficulty=1.0))
    done = len(steps(ledger, curriculum, **losses))
    drop(ledger, *texts(80, start=100), name="new.jsonl")
    curriculum.wake()
    replayed = [
        int(old[0]) for _, old, _ in steps(ledger, curriculum, first=done, **losses) if int(old[0]) < 20
    ]
    hard = sum(i < 4 for i in replayed)
    assert hard > len(replayed) / 2  # a fifth of them, were all alike


def test_what_was_learned_lately_is_replayed_more_often(ledger):
    drop(ledger, *texts(400), name="old.jsonl")
    config = ReplayConfig(recency_half_life=20, difficulty=0)
    curriculum = Curriculum(ledger, config)
    done = len(steps(ledger, curriculum))
    drop(ledger, *texts(100, start=400), name="new.jsonl")
    ids = [int(old[0]) for _, old, _ in steps(ledger, Curriculum(ledger, config), first=done, count=1)]
    curriculum.wake()
    ids += [int(old[0]) for _, old, _ in steps(ledger, curriculum, first=done + 1)]
    assert sum(i >= 300 for i in ids) > 0.3 * len(ids)  # the newest quarter or less of all


def test_the_same_seed_makes_the_same_choices_also_across_a_restart(tmp_path):
    def run(name: str, seed: int, restart_every: int) -> list[tuple[list[str], list[str], int]]:
        made: list[tuple[list[str], list[str], int]] = []
        for number in range(3):
            with Ledger(tmp_path / name / "ledger.sqlite") as ledger:
                drop(ledger, *texts(8, start=10 * number), passes=2, name=f"{number}.jsonl")
            while True:
                with Ledger(tmp_path / name / "ledger.sqlite") as ledger:
                    curriculum = Curriculum(ledger, ReplayConfig(self_share=0.3), seed=seed, chunk=5)
                    curriculum.replay.own = OWN
                    more = steps(ledger, curriculum, first=len(made), count=restart_every)
                if not more:
                    break
                made += more
        return made

    straight = run("straight", 1, 10**6)
    assert len(straight) == 48
    assert run("restarted", 1, 3) == straight
    assert run("another", 2, 10**6) != straight


def test_the_models_own_texts_stand_in_until_there_is_old_data_and_keep_a_share(ledger):
    drop(ledger, *texts(10), passes=2, name="first.jsonl")
    curriculum = Curriculum(ledger, ReplayConfig(self_share=0.25))
    curriculum.replay.own = OWN
    made = steps(ledger, curriculum, count=10)  # the first round: nothing is learned yet
    assert made == [([str(i)], [], 1) for i in range(10)]
    steps(ledger, curriculum, first=10)
    drop(ledger, *texts(100, start=100), name="second.jsonl")
    curriculum.wake()
    made = steps(ledger, curriculum, first=20)
    own = sum(own for _, _, own in made)
    assert 10 < own < 45
    assert sum(len(old) for _, old, _ in made) == 100 - own


def test_learned_examples_that_lie_far_apart_are_all_found(ledger):
    drop(ledger, *texts(1000, extra=', "priority": -1'), '{"text": "x", "id": "last"}', name="a.jsonl")
    with ledger._db.write(fsync=False) as db:
        db.execute("UPDATE examples SET state = 'trained', last_loss = 1 WHERE example_id IN (1, 2, 1001)")
    curriculum = Curriculum(ledger, ReplayConfig(difficulty=0))
    replayed = Counter(old[0] for _, old, _ in steps(ledger, curriculum, count=60))
    assert {"0", "1", "last"} <= set(replayed)


# --- until_loss -------------------------------------------------------------------------------------------


def test_until_loss_retires_what_is_learned_and_reopens_what_was_forgotten(ledger):
    config = ReplayConfig(reopen_factor=1.5, reopen_passes=2, max_reopened=2)
    drop(ledger, *texts(1, extra=', "until_loss": 0.6'), passes=5, name="old.jsonl")
    curriculum = Curriculum(ledger, config)
    assert len(steps(ledger, curriculum)) == 1  # reached at once: four passes are spared
    assert ledger.counts().trained == 1

    def one_more(number: int, loss: float) -> list[tuple[list[str], list[str], int]]:
        drop(ledger, *texts(1, start=number), name=f"{number}.jsonl")
        curriculum.wake()
        first = 10 * number
        made = steps(ledger, curriculum, first=first, count=1, _0=loss)
        return made + steps(ledger, curriculum, first=first + 1, _0=0.5)

    def new(made: list[tuple[list[str], list[str], int]]) -> list[str]:
        return [name for names, _, _ in made for name in names]

    assert new(one_more(1, loss=0.8)) == ["1"]  # above until_loss, not clearly
    for number in (2, 3):
        made = []
        while not any("0" in old for _, old, _ in made):  # until it is among the replayed
            drop(ledger, *texts(1, start=100 * number + len(made)), name=f"{number}-{len(made)}.jsonl")
            curriculum.wake()
            made += steps(ledger, curriculum, first=1000 * number + 5 * len(made), count=1, _0=3.0)
        again = steps(ledger, curriculum, first=2000 * number, _0=0.5)
        assert new(again) == ["0"]  # one pass, and its loss is below until_loss
    assert ledger.pool.reopen(1, passes=2, at_most=2) is False  # twice is enough


def test_an_example_that_stays_hard_cannot_keep_the_trainers_busy(ledger):
    config = ReplayConfig(reopen_passes=2, max_reopened=2)
    drop(ledger, *texts(1, extra=', "until_loss": 0.1'), passes=2, name="hard.jsonl")
    curriculum = Curriculum(ledger, config)
    made = steps(ledger, curriculum, _0=5.0)
    for number in range(1, 6):
        drop(ledger, *texts(30, start=100 * number), name=f"{number}.jsonl")
        curriculum.wake()
        made += steps(ledger, curriculum, first=len(made), count=1000, _0=5.0)
    passes = sum("0" in names for names, _, _ in made)
    assert passes == 2 + 2 * 2
    assert ledger.is_idle()


# --- a million --------------------------------------------------------------------------------------------


def test_a_million_pending_and_a_million_learned_take_little_memory_and_few_rows(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        drop(ledger, *texts(1), name="first.jsonl")
        million = 1_000_000
        with ledger._db.write(fsync=False) as db:
            db.execute("DELETE FROM lines")
            db.execute("DELETE FROM examples")
            count = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {2 * million})"
            db.execute(
                f"{count} INSERT INTO examples (example_id, file_id, line_no, byte_offset, priority, passes,"
                f" last_loss, state) SELECT i, 1, i, 0, 0, 1, 1.0, iif(i <= {million}, 'durable', 'accepted') FROM n"
            )
            db.execute(
                f"{count} INSERT INTO lines SELECT i, json_object('text', 'example ' || i, 'id', '' || i) FROM n"
            )
            instructions = 0

            def count_instructions() -> int:
                nonlocal instructions
                instructions += 1000
                return 0

            db.set_progress_handler(count_instructions, 1000)
        curriculum = Curriculum(ledger)
        curriculum.take(0, step=0)  # reads a chunk
        tracemalloc.start()
        instructions = 0
        for step in range(1, 21):
            batch = curriculum.take(0, step=step)
            assert (len(batch.new), len(batch.replayed)) == (1, 1)
            assert batch.replayed[0].example_id <= million < batch.new[0].example_id
            train(ledger, curriculum, batch, step)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20
        assert instructions < 20 * 50_000  # a look through a million rows takes millions
