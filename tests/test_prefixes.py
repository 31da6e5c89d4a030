"""Which beginnings are read once, and that every text is still read whole."""

import random

import pytest

from hogwild.prefixes import OVERHEAD_TOKENS, Plan, plan


def texts_of(planned: Plan) -> list[list[int]]:
    """What each text's chain of stretches adds up to."""
    found = []
    for end in planned.ends:
        tokens: list[int] = []
        while end is not None:
            tokens[:0] = planned.nodes[end].ids
            end = planned.nodes[end].parent
        found.append(tokens)
    return found


@pytest.mark.parametrize("seed", range(30))
def test_every_text_is_read_whole_and_parents_first(seed):
    """Random texts that often begin alike, some empty, some equal, some the beginning of another."""
    chance = random.Random(seed)
    texts: list[list[int]] = []
    for _ in range(chance.randint(0, 9)):
        begun = chance.choice(texts) if texts and chance.random() < 0.8 else []
        kept = begun[: chance.randint(0, len(begun))]
        texts.append([*kept, *chance.choices(range(3), k=chance.choice([0, 1, 20, 60]))])
    planned = plan(texts)
    assert texts_of(planned) == texts
    assert sum(len(node.ids) for node in planned.nodes) <= sum(map(len, texts))
    seen: set[int] = set()
    for level in planned.levels():
        assert all(planned.nodes[i].parent in {None, *seen} for i in level)
        seen.update(level)
    assert seen == set(range(len(planned.nodes)))


def test_a_long_beginning_is_read_once_and_a_short_one_with_each_text():
    long, short = list(range(OVERHEAD_TOKENS + 1)), list(range(OVERHEAD_TOKENS - 1))
    assert [len(n.ids) for n in plan([[*long, 1, 2], [*long, 2]]).nodes] == [len(long), 2, 1]
    assert [len(n.ids) for n in plan([[*short, 1, 2], [*short, 2]]).nodes] == [len(short) + 2, len(short) + 1]


def test_equal_contexts_are_read_once_however_short():
    planned = plan([[5, 6], [5, 6], [5, 6]])
    assert len(planned.nodes) == 1
    assert planned.ends == [0, 0, 0]
