"""What a trainer does so that a GPU is not made to wait, as far as it shows without one.

The updates of these tests answer as those of a GPU do, with numbers that are still on the device (here: with tensors),
and whatever would make the host wait for the device is noted.
"""

import math
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild import apollo, streams
from hogwild.apollo import Optimizer
from hogwild.arena.control import ControlPage
from hogwild.errors import ConfigError, LossError
from hogwild.governor import Governor, prepare_gpu
from hogwild.settings import GovernorConfig, OptimizerConfig, TrainingConfig
from hogwild.streams import Stream, settle
from hogwild.trainer import Item, Trainer
from hogwild_kernels import UpdateResult
from test_trainer import EXAMPLE, OTHER, Setting
from tiny import llama

CPU = torch.device("cpu")
WAITING = {
    "_local_scalar_dense",
    "masked_select",
    "nonzero",
    "unique",
    "unique2",
    "_unique2",
    "repeat_interleave",
    "equal",
    "is_nonzero",
}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: operators that need a number of it, such as how many elements of a
    mask are set, and lists of numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:
            self.found["tolist"] += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        if name in WAITING or any(one is not None and one.dtype == torch.bool for one in indices):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, bool]]:
    """Updates that answer with tensors; what they said. Every third one skips."""
    said: list[tuple[str, float, bool]] = []

    def update(weight: torch.Tensor, *given: Any, seed: int) -> UpdateResult:
        state = next(one for one in given if hasattr(one, "exp_avg"))
        number = len(said)
        said.append((state.name, 0.5 + number, number % 3 == 0))
        del weight, seed
        return UpdateResult(torch.tensor(said[-1][1]), torch.tensor(said[-1][2]))

    monkeypatch.setattr(apollo, "apollo_update", update)
    monkeypatch.setattr(apollo, "adam_update", update)
    return said


def waiting(trainer: Trainer) -> Trainer:
    trainer.stream.waits = True
    return trainer


@pytest.mark.parametrize("context", ["frozen", "full"])
def test_a_step_waits_at_its_end(tmp_path, monkeypatch, late, context):
    trainer = waiting(Setting(llama(tmp_path / "model"), context=context).trainer)
    items = [Item(EXAMPLE), Item(OTHER), Item(EXAMPLE)]
    with Waits(monkeypatch) as waits:
        trainer.step(items)
    assert waits.found == {"tolist": 1}
    assert late


def test_what_would_wait_is_seen(tmp_path, monkeypatch, late):
    """The test above proves nothing unless this one holds."""
    trainer = Setting(llama(tmp_path / "model")).trainer
    with Waits(monkeypatch) as waits:
        trainer.step([Item(EXAMPLE)])
    asked = 1 + 2 * len(late)  # may the losses be trained; the norm and the verdict of each update
    assert waits.found["_local_scalar_dense"] == asked
    with Waits(monkeypatch) as waits:
        assert torch.ones(3).any()
        torch.ones(3).bool().nonzero()
        torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2]))
        table, mask = torch.zeros(3, 2), torch.ones(3).bool()
        table[mask] += table[mask]
    assert set(waits.found) == {"_local_scalar_dense", "nonzero", "repeat_interleave", "index", "index_put_"}


def test_what_the_updates_say_is_read_in_their_order(tmp_path, late):
    trainer = waiting(Setting(llama(tmp_path / "model")).trainer)
    result = trainer.step([Item(EXAMPLE)])
    assert result.updates == len(late) > 10
    assert result.skipped == sum(skipped for *_, skipped in late)
    assert result.update_norm == pytest.approx(sum(norm**2 for _, norm, _ in late) ** 0.5)
    assert trainer.take_moved() == pytest.approx({name: norm for name, norm, _ in late})
    late.clear()
    assert trainer.step([Item(EXAMPLE)]).updates == len(late), "nothing of the step before is left"


def test_the_epoch_does_not_miss_an_update_that_was_queued_before_it_began(tmp_path, monkeypatch, late):
    """On a GPU a weight is written some time after the host has gone on; an epoch may begin in between."""
    setting = Setting(llama(tmp_path / "model"))
    trainer = waiting(setting.trainer)
    setting.progress.advance()  # the next steps end no epoch by themselves
    finish = trainer._gather.finish

    def finish_and_tick(factor: torch.Tensor | None) -> None:
        finish(factor)
        setting.progress.settle()

    monkeypatch.setattr(trainer._gather, "finish", finish_and_tick)
    trainer.step([Item(EXAMPLE)])
    before = setting.progress.epoch
    setting.progress.settle()
    assert setting.progress.epoch == before + 1
    setting.progress.settle()
    assert setting.progress.epoch == before + 1
    assert late


def test_the_step_is_counted_after_its_results_are_read(tmp_path, monkeypatch, late):
    """What the control page says has been done has been written."""
    setting = Setting(llama(tmp_path / "model"))
    trainer, seen = waiting(setting.trainer), []
    settle = trainer._settle
    monkeypatch.setattr(
        trainer, "_settle", lambda losses: (seen.append(setting.progress.steps), settle(losses))[1]
    )
    assert trainer.step([Item(EXAMPLE)]).step == 1
    assert seen == [0]
    assert late


def test_new_state_is_settled_before_other_threads_see_it(monkeypatch):
    optimizer = Optimizer(OptimizerConfig(rank=4), 0)
    shown: list[tuple[str, int]] = []
    monkeypatch.setattr(apollo, "settle", lambda device: shown.append((device.type, len(optimizer))))
    weight, rows = torch.zeros(8, 6), torch.ones(3, 6)
    for _ in range(2):
        optimizer.update_linear("w", weight, rows, torch.ones(3, 8), 0)
        optimizer.update_small("b", torch.zeros(6), torch.ones(6), 0)
    assert shown == [("cpu", 0), ("cpu", 1)], "once for each weight, and before it is there"
    optimizer.load(optimizer.tensors(), {"w": (8, 6), "b": (6,)})
    assert len(shown) == 3


def test_state_is_kept_beside_the_weights():
    optimizer = Optimizer(OptimizerConfig(rank=4), 0, "meta")
    saved = Optimizer(OptimizerConfig(rank=4), 0)
    saved.update_linear("w", torch.zeros(8, 6), torch.ones(3, 6), torch.ones(3, 8), 0)
    saved.update_small("b", torch.zeros(6), torch.ones(6), 0)
    optimizer.load(saved.tensors(), {"w": (8, 6), "b": (6,)})
    assert {tensor.device.type for tensor in optimizer.tensors().values()} == {"meta"}
    assert {tensor.device.type for tensor in saved.tensors().values()} == {"cpu"}


def test_on_a_cpu_nothing_is_queued():
    stream = Stream(CPU)
    assert not stream.waits
    threads = torch._C._is_multithreading_enabled()
    with stream.current():
        assert torch._C._is_multithreading_enabled() == threads
        assert torch.equal(streams.put([3, 4], CPU), torch.tensor([3, 4]))
    assert streams.put([True, False], CPU).dtype == torch.bool
    assert streams.put([], CPU).dtype == torch.int64, "an index, also of nothing"
    given = torch.ones(2)
    assert streams.put(given, CPU) is given
    streams.settle(CPU)
    streams.cap(CPU, 1e9)


def test_the_environment_of_cuda_is_set_where_the_operator_has_not():
    environment: dict[str, str] = {}
    prepare_gpu(TrainingConfig(mps_percent=30), environment)
    assert environment == {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    for own in (
        {"CUDA_MPS_CLIENT_PRIORITY": "0", "PYTORCH_ALLOC_CONF": ""},
        {"CUDA_MPS_CLIENT_PRIORITY": "0", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
    ):
        environment = dict(own)
        prepare_gpu(TrainingConfig(), environment)
        assert environment == own
    environment = {}
    prepare_gpu(TrainingConfig(low_priority=False), environment)
    assert "CUDA_MPS_CLIENT_PRIORITY" not in environment


# --- on a device ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_thread_has_a_stream_of_the_lowest_priority():
    stream = Stream(torch.device("cuda", 0))
    with stream.current():
        mine = torch.cuda.current_stream()
        assert mine != torch.cuda.default_stream()
        assert mine.priority == max(torch.cuda.Stream.priority_range())
        assert not torch._C._is_multithreading_enabled()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
def test_a_step_on_a_device_does_what_one_on_the_cpu_does(tmp_path: Path):
    from hogwild.weights import load_arena

    folder = llama(tmp_path / "model")
    here = Setting(folder, rounding="nearest")
    there = Setting(folder, arena=load_arena(folder, "cuda"), rounding="nearest")
    for _ in range(3):
        mine, theirs = here.trainer.step([Item(EXAMPLE)]), there.trainer.step([Item(EXAMPLE)])
        assert theirs.losses == pytest.approx(mine.losses, rel=1e-3)
        assert theirs.update_norm == pytest.approx(mine.update_norm, rel=1e-2)
        assert (theirs.updates, theirs.skipped) == (mine.updates, 0)
    for name, weight in here.snapshot().items():
        torch.testing.assert_close(there.weights.view(name).cpu(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_step_on_a_device_makes_the_host_wait_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hogwild.weights import load_arena

    folder = llama(tmp_path / "model")
    setting = Setting(folder, arena=load_arena(folder, "cuda"))
    items = [Item(EXAMPLE), Item(OTHER)]
    setting.trainer.step(items)  # tunes, and makes the state
    with Waits(monkeypatch) as waits:
        setting.trainer.step(items)
    assert waits.found == {"tolist": 1}
    torch.cuda.set_sync_debug_mode("warn")  # what torch itself knows of
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            setting.trainer.step(items)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ["synchronizing" in str(one.message) for one in told].count(True) == 1


@pytest.mark.gpu
def test_a_step_on_a_device_writes_nothing_if_a_loss_is_refused(tmp_path: Path):
    from hogwild.weights import load_arena

    folder = llama(tmp_path / "model", torch.bfloat16)
    setting = Setting(folder, arena=load_arena(folder, "cuda"))
    trainer = setting.trainer
    items = [Item(EXAMPLE), Item(OTHER, weight=-1.0)]
    trainer.step(items)
    before, trainer._max_loss = setting.snapshot(), 0.0  # which is not asked of what is unlearned
    with pytest.raises(LossError):
        trainer.step(items)
    assert all(torch.equal(before[name], weight) for name, weight in setting.snapshot().items())
    trainer._max_loss = math.inf
    trainer.step(items)
    assert any(not torch.equal(before[name], weight) for name, weight in setting.snapshot().items())


@pytest.mark.gpu
def test_a_thread_stands_aside_when_what_it_has_queued_is_done():
    device = torch.device("cuda", 0)
    control = ControlPage.create(bytes(32))
    gauge, stream = control.new_gauge(), Stream(device)
    idle = list[bool]()

    def rest(_seconds: float) -> None:
        idle.append(torch.cuda.current_stream(device).query())
        gauge.set_in_flight(0)

    governor = Governor(GovernorConfig(policy="strict"), control, partial(settle, device), sleep=rest)
    with stream.current():
        torch.cuda._sleep(10**8)
        governor.between_layers()
        assert not torch.cuda.current_stream(device).query(), "nobody waits, so the host goes on"
        gauge.set_in_flight(1)
        governor.between_layers()
    assert idle
    assert all(idle)


@pytest.mark.gpu
def test_training_cannot_take_more_than_it_may():
    device = torch.device("cuda", 0)
    streams.cap(device, 0.25)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 29, device=device)
        torch.empty(1 << 20, device=device)
        with pytest.raises(ConfigError, match="gpu_memory_gib"):
            streams.cap(device, 1e6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
