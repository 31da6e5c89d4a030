"""How a step's examples are put into passes, updates and readings, and that nothing of it shows in what is learned."""

import random
from itertools import chain, pairwise

import pytest
import torch

from hogwild.batch import Item, Work, packs, parts, runs
from hogwild.context import Pack, Segment
from hogwild.encoding import Encoded
from hogwild.errors import LossError
from test_trainer import Setting
from tiny import llama


def work(index: int, tokens: int, context: int = 0) -> Work:
    return Work(index, 1.0, [5] * context, [7] * tokens, [7], [0], [])


def some(seed: int) -> list[Work]:
    dice = random.Random(seed)
    return [work(i, dice.randint(1, 120), dice.randint(0, 200)) for i in range(dice.randint(1, 12))]


def text(seed: int, context: int, trained: int) -> Encoded:
    dice = random.Random(seed)
    ids = [dice.randrange(3, 64) for _ in range(context + trained)]
    return Encoded(ids, [False] * context + [True] * trained)


@pytest.mark.parametrize("seed", range(20))
def test_no_pass_is_above_a_budget_but_by_a_single_example(seed):
    works = some(seed)
    groups = packs(works, lambda one: (len(one.ids), len(one.context)), (100, 150))
    assert sorted(one.index for one in chain(*groups)) == list(range(len(works)))
    for group in groups:
        within = sum(len(one.ids) for one in group) <= 100 and sum(len(one.context) for one in group) <= 150
        assert within or len(group) == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_more_waits_for_an_update_than_may_and_the_longest_pass_never_does(seed):
    passes = [[one] for one in some(seed)]
    split = parts(passes, lambda tokens: 200 - tokens)
    assert sorted(one.index for one in chain(*chain(*split))) == list(range(len(passes)))
    for part in split:
        lengths = [len(one.ids) for (one,) in part]
        assert lengths == sorted(lengths)
        assert sum(lengths[:-1]) <= max(200 - lengths[-1], 0)
    assert len(parts(passes, lambda _: 10_000)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_more_context_is_kept_than_may_but_for_a_single_pass(seed):
    passes = [[one] for one in some(seed)]
    found = runs(passes, 300)
    assert list(chain(*found)) == passes
    for run in found:
        assert sum(len(one.context) for (one,) in run) <= 300 or len(run) == 1
    assert all(sum(len(one.context) for (one,) in [*run, after[0]]) > 300 for run, after in pairwise(found))


LONG, SHORT = Item(text(1, 6, 30), weight=2.0), Item(text(2, 4, 9))


def apart(setting: Setting) -> None:
    """Each item is a pass, and no pass waits for another."""
    setting.trainer._batch_tokens, setting.trainer._activations = 1, 0


def test_a_step_that_would_keep_too_much_is_one_update_for_each_part_of_it(tmp_path):
    """The same, to the bit, as a step for each part, with the losses of before both."""
    folder = llama(tmp_path / "model")
    whole, by_hand = Setting(folder), Setting(folder)
    apart(whole)
    apart(by_hand)
    before = [by_hand.trainer.loss(item.encoded) for item in (SHORT, LONG)]
    result = whole.trainer.step([SHORT, LONG])
    one, other = (by_hand.trainer.step([Item(i.encoded, i.weight / 2)]) for i in (LONG, SHORT))
    after = whole.snapshot()
    assert all(torch.equal(after[name], tensor) for name, tensor in by_hand.snapshot().items())
    assert result.step == whole.progress.steps == 1
    assert result.updates == one.updates + other.updates
    assert result.update_norm == pytest.approx((one.update_norm**2 + other.update_norm**2) ** 0.5)
    assert result.losses == pytest.approx(before, rel=1e-5)
    assert other.losses[0] != pytest.approx(before[0], rel=1e-5), "it came after the update of the other"


def test_nothing_of_a_step_in_parts_is_written_if_any_of_it_is_refused(tmp_path):
    setting = Setting(llama(tmp_path / "model"))
    apart(setting)
    losses = [setting.trainer.loss(item.encoded) for item in (SHORT, LONG)]
    before = setting.snapshot()
    setting.trainer._max_loss = min(losses) + 1e-3
    with pytest.raises(LossError):
        setting.trainer.step([SHORT, LONG])
    assert all(torch.equal(before[name], tensor) for name, tensor in setting.snapshot().items())
    setting.trainer._max_loss = max(losses) + 1
    assert setting.trainer.step([SHORT, LONG]).step == 1


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_what_waits_for_an_update_counts_as_activations(tmp_path, room):
    """The longer pass would fit alone. Beside what the shorter one keeps for the update, it may not."""
    trainer = Setting(llama(tmp_path / "model")).trainer
    trainer._batch_tokens = 1
    trainer.step([LONG])
    kept = trainer._recompute._bytes_per_token * 35
    waiting = 12 * trainer._gather.row_nbytes
    trainer._activations = trainer._recompute._budget = int(kept + room * waiting)
    seen: list[tuple[int, bool]] = []
    trainer.model.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append((trainer._gather.waiting_nbytes, trainer._recompute._on))
    )
    result = trainer.step([SHORT, LONG])
    assert result.updates == len(trainer._gather.linears) + len(trainer._gather.small), "one update"
    (nothing, alone), (waited, beside) = seen[:2]
    assert (nothing, alone) == (0, False)
    assert 0.7 * waiting < waited <= waiting
    assert beside == (room < 1)


@pytest.mark.parametrize("kind", ["frozen", "full"])
def test_contexts_are_read_in_rows_of_a_few_batches(tmp_path, kind):
    """One is longer than a row, two share one; nothing of it can be seen in what is learned."""
    folder = llama(tmp_path / "model", max_position_embeddings=512)
    items = [
        Item(text(3, 190, 8), context=kind),
        Item(text(4, 70, 5)),
        Item(text(5, 75, 6)),
        Item(text(6, 3, 4)),
    ]
    wide, narrow = Setting(folder), Setting(folder)
    narrow.trainer._context_tokens = 40
    rows: list[int] = []

    def note(_module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            rows.append(arguments[0].numel())

    narrow.trainer.model.base_model.register_forward_pre_hook(note)
    results = [setting.trainer.step(items) for setting in (wide, narrow)]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-5)
    assert max(rows) == 40
    assert sum(rows) == (189 + 69 + 74 if kind == "frozen" else 69 + 74)
    one, other = (setting.snapshot() for setting in (wide, narrow))
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=2e-5) for name in one)


@pytest.mark.parametrize("window", [None, 9])
def test_a_mask_is_the_same_in_pieces(tmp_path, monkeypatch, window):
    trainer = Setting(llama(tmp_path / "model")).trainer
    trainer._layers.windows = [window] * 2
    states = trainer._states([Segment([5] * 20), Segment([6] * 11)])
    segments = [Segment([7] * 13, states[0]), Segment([8] * 17), Segment([9] * 4, states[1])]
    masks = []
    for elements in (1 << 20, 100, 1):
        monkeypatch.setattr("hogwild.context._MASK_PIECE", elements)
        pack = Pack(segments, trainer._layers, torch.bfloat16, torch.device("cpu"))
        masks.append(pack.arguments["attention_mask"])
    assert masks[0].dtype == torch.bfloat16
    assert all(torch.equal(masks[0], one) for one in masks)
    assert masks[0].isinf().any()
