"""Serving comes first: what the server says it has to do, and how trainers stand aside for it."""

import asyncio
import os
import threading
import time
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hogwild import pulse, skeleton
from hogwild.apollo import Optimizer
from hogwild.arena import control as page
from hogwild.arena.control import MAX_GAUGES, ControlPage, Load
from hogwild.config import load
from hogwild.curriculum import Curriculum
from hogwild.encoding import Encoded
from hogwild.governor import LINGER_S, Governor, limit_gpu, lower_priority
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.lines import content_hash, read_lines
from hogwild.settings import GovernorConfig, OptimizerConfig, TrainingConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.vllm_plugin import load as server_load
from hogwild.vllm_plugin.load import Meter
from hogwild.weights import Weights, load_arena
from support import wait_until
from tiny import llama, tokenizer


@pytest.fixture
def control() -> ControlPage:
    return ControlPage.create(bytes(32))


# --- what the server says --------------------------------------------------------------------------------------------


def test_requests_of_all_api_servers_count_together(control):
    first, second = control.new_gauge(), control.new_gauge()
    assert not control.busy
    first.set_in_flight(2)
    second.set_engine(3, 1)
    second.add_tokens(10, 0.5)
    first.add_tokens(2, 0.25)
    assert control.busy
    assert control.load == Load(2, 3, 1, 12, 0.75)
    first.set_in_flight(0)
    assert control.busy, "the engine still works: an answer in the background"
    second.set_engine(0, 0)
    assert not control.busy
    numbers = [control.new_gauge().number for _ in range(MAX_GAUGES)]
    assert numbers == [*range(2, MAX_GAUGES), MAX_GAUGES - 1, MAX_GAUGES - 1]


@pytest.mark.parametrize("what", ["set_in_flight", "set_engine"])
def test_what_a_killed_server_has_said_does_not_count_for_ever(control, monkeypatch, what):
    gauge = control.new_gauge()
    getattr(gauge, what)(*((1,) if what == "set_in_flight" else (1, 1)))
    assert control.busy
    later = time.monotonic_ns() + round(page.SERVER_ALIVE_S * 1e9)
    monkeypatch.setattr(page.time, "monotonic_ns", lambda: later)
    assert not control.busy


def test_a_request_counts_from_its_arrival_to_the_end_of_its_answer(control, monkeypatch):
    monkeypatch.setattr(server_load, "_BEAT_S", 0.01)
    gauge = control.new_gauge()
    meter = Meter(gauge)

    async def forever() -> None:
        with meter.request():
            await asyncio.Event().wait()

    async def run() -> None:
        with meter.request():
            assert control.load.in_flight == 1
            other = asyncio.ensure_future(forever())
            await asyncio.sleep(0)
            assert control.load.in_flight == 2
            other.cancel()  # a client that hangs up
            await asyncio.wait([other])
            assert control.load.in_flight == 1
            said = gauge.word(page._BEAT)
            for _ in range(3):  # said again and again, for as long as it lasts
                while (now := gauge.word(page._BEAT)) == said:
                    await asyncio.sleep(0.01)
                said = now
            assert control.load.in_flight == 1
        assert not control.busy
        assert meter._beating is None

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_vllm_measures_reaches_the_page(control, caplog):
    meter = Meter(control.new_gauge())
    loggers: list[Any] = []
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(
        logger_manager=SimpleNamespace(stat_loggers=loggers))))  # fmt: skip
    meter.listen(app)
    (logger,) = loggers
    scheduler = SimpleNamespace(num_running_reqs=2, num_waiting_reqs=5)
    logger.record(
        scheduler, SimpleNamespace(inter_token_latencies_iter=[0.1, 0.2]), mm_cache_stats=None, engine_idx=0
    )
    logger.record(None, SimpleNamespace(inter_token_latencies_iter=[]))
    logger.record(scheduler, None)
    assert control.load == Load(0, 2, 5, 2, 0.3)
    assert not caplog.records
    meter.listen(SimpleNamespace())
    assert "stands aside by the number of requests alone" in caplog.text


# --- what trainers do ------------------------------------------------------------------------------------------------


class Simulated:
    """A server and one trainer thread in simulated time: tokens take `token_s`, and while the trainer works, `slowdown`
    times as much longer."""

    def __init__(
        self, control: ControlPage, settings: GovernorConfig, token_s: float = 0.05, slowdown: float = 0.8
    ):
        self.now, self.control, self.token_s, self.slowdown = 0.0, control, token_s, slowdown
        self.gauge = control.new_gauge()
        self.governor = Governor(settings, control, self.settle, clock=lambda: self.now, sleep=self.rest)
        self.worked = 0.0
        self.tokens: list[float] = []  # seconds that each took
        self.busy_from, self.busy_until = 0.0, float("inf")
        self._done = self._token_began = 0.0

    def settle(self) -> None:
        """Nothing is queued on a CPU."""

    def rest(self, seconds: float) -> None:
        assert seconds > 0, "a trainer that stands aside must not spin"
        self._pass(seconds, 1.0)

    def work(self, seconds: float) -> None:
        """One layer, and then the governor."""
        self.worked += seconds
        self._pass(seconds, 1 + self.slowdown)
        self.governor.between_layers()

    def _pass(self, seconds: float, longer: float) -> None:
        while seconds > 1e-12:
            step = min(seconds, 0.001)
            self.now += step
            seconds -= step
            busy = self.busy_from <= self.now < self.busy_until
            self.gauge.set_in_flight(int(busy))
            self.gauge.set_engine(int(busy), 0)
            if not busy:
                self._done, self._token_began = 0.0, self.now
                continue
            self._done += step / longer / self.token_s
            if self._done >= 1:
                took, self._token_began, self._done = self.now - self._token_began, self.now, self._done - 1
                self.tokens.append(took)
                self.gauge.add_tokens(1, took)

    def run(self, seconds: float, layer_s: float = 0.004) -> None:
        end = self.now + seconds
        while self.now < end:
            self.work(layer_s)


class OnGpu(Simulated):
    """The same on a GPU: a layer is queued in a tenth of the time that it takes there, one behind the other."""

    queued = 0.0

    def settle(self) -> None:
        self._run(self.queued)

    def rest(self, seconds: float) -> None:
        busy = min(self.queued, seconds)
        self._run(busy)
        if seconds > busy:
            super().rest(seconds - busy)

    def work(self, seconds: float) -> None:
        self.queued += seconds
        self._run(seconds / 10)
        self.governor.between_layers()
        if self.queued > 0.2:  # the end of a pass, whose losses are waited for
            self._run(self.queued)

    def _run(self, seconds: float) -> None:
        self.worked += seconds
        self.queued -= seconds
        self._pass(seconds, 1 + self.slowdown)


def test_policy_off_never_stands_aside(control):
    simulated = Simulated(control, GovernorConfig(policy="off"))
    simulated.run(2)
    assert simulated.worked == pytest.approx(simulated.now)
    assert simulated.governor.yields == 0


def test_policy_strict_trains_only_while_nobody_waits(control):
    simulated = Simulated(control, GovernorConfig(policy="strict"))
    simulated.busy_from, simulated.busy_until = 1.0, 3.0
    simulated.run(5, layer_s=0.01)
    assert simulated.now < 5.1
    assert simulated.governor.yields == 1
    assert simulated.governor.yielded_s == pytest.approx(2 + LINGER_S, abs=0.03)
    assert simulated.worked == pytest.approx(3 - LINGER_S, abs=0.1)
    assert max(simulated.tokens) < 0.07, "all but the first are as without training"


@pytest.mark.parametrize("kind", [Simulated, OnGpu])
@pytest.mark.parametrize(("slowdown", "added"), [(0.3, 0.1), (0.8, 0.1), (0.8, 0.3), (3.0, 0.1)])
def test_policy_share_finds_how_much_training_a_token_bears(control, slowdown, added, kind):
    simulated = kind(control, GovernorConfig(policy="share", added_latency=added), slowdown=slowdown)
    simulated.run(30)  # to find out
    worked, began, simulated.tokens = simulated.worked, simulated.now, []
    simulated.run(20)
    longer = sum(simulated.tokens) / len(simulated.tokens) / simulated.token_s - 1
    assert longer < added * 1.15, "a token does not take longer than was allowed"
    assert longer > added * 0.5, "and training gets what is left"
    assert (simulated.worked - worked) / (simulated.now - began) > 0.5 * added / slowdown
    simulated.tokens.sort()
    assert simulated.tokens[int(0.99 * len(simulated.tokens))] < simulated.token_s * (1 + added) * 1.15, (
        "evenly"
    )


def test_a_server_that_was_killed_under_load_does_not_end_all_measuring(control):
    """Its requests were taken for those of the next one, of which so many tokens as of all of them were waited for."""
    dead = control.new_gauge()
    dead.set_in_flight(64)
    dead.set_engine(64, 8)
    long_ago = time.monotonic_ns() - round(2 * page.SERVER_ALIVE_S * 1e9)
    dead._set(page._BEAT, long_ago)
    dead._set(page._STATS_BEAT, long_ago)
    assert control.load == Load(0, 0, 0, 0, 0.0)
    simulated = Simulated(control, GovernorConfig(policy="share"), slowdown=0.2)
    simulated.run(30)
    assert simulated.governor.share.slowdown == pytest.approx(0.2, abs=0.1)


def test_share_lets_all_work_through_that_costs_no_token_anything(control):
    simulated = Simulated(control, GovernorConfig(policy="share"), slowdown=0.0)
    simulated.run(40)
    worked, began = simulated.worked, simulated.now
    simulated.run(20)
    assert (simulated.worked - worked) / (simulated.now - began) > 0.6, "all but the turns of measuring"


def test_share_works_on_without_any_measurement(control):
    """vLLM's statistics are off, or a long prompt is read: neither stops training for good."""
    simulated = Simulated(control, GovernorConfig(policy="share"), token_s=1e9)
    simulated.run(20)
    assert 0.02 < simulated.worked / simulated.now < 0.2


def test_a_policy_changes_live_and_a_step_that_must_end_is_not_held_up(control):
    gauge = control.new_gauge()
    governor = Governor(GovernorConfig(policy="strict"), control)
    through = threading.Event()

    def train() -> None:
        governor.between_layers()
        through.set()

    def held() -> threading.Thread:
        through.clear()
        gauge.set_in_flight(1)
        thread = threading.Thread(target=train)
        thread.start()
        for _ in range(10):
            gauge.set_in_flight(1)
            assert not through.wait(0.02)
        return thread

    for release in (
        lambda: governor.configure(GovernorConfig(policy="off")),
        governor.hurry,
        lambda: gauge.set_in_flight(0),
    ):
        thread = held()
        release()
        thread.join(60)
        assert through.is_set()
        governor.configure(GovernorConfig(policy="strict"))
        governor.hurry(False)
    assert governor.yields == 3


def test_policies_change_live_in_every_order_under_load(control):
    gauge, over, rounds = control.new_gauge(), threading.Event(), 0
    governor = Governor(GovernorConfig(policy="off"), control)

    def train() -> None:
        nonlocal rounds
        while not over.is_set():
            governor.between_layers()
            rounds += 1

    thread = threading.Thread(target=train)
    gauge.set_in_flight(1)
    thread.start()
    try:
        for policies in permutations(("off", "share", "strict"), 3):
            for policy in policies:
                governor.configure(GovernorConfig(policy=policy))
                before = rounds
                for _ in range(3):
                    gauge.set_in_flight(1)
                    gauge.set_engine(1, 0)
                    gauge.add_tokens(5, 0.1)
                    time.sleep(0.02)
                if policy == "off":
                    wait_until(lambda before=before: rounds > before, "training goes on")
                assert thread.is_alive()
    finally:
        governor.configure(GovernorConfig(policy="off"))
        over.set()
        thread.join(60)
    assert not thread.is_alive()


def test_trainers_yield_between_the_layers_of_both_passes(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=128)
    weights = Weights(load_arena(folder))
    before = {name: weights.view(name).clone() for name in weights.names}
    untouched: list[bool] = []

    def between() -> None:
        untouched.append(all(torch.equal(weights.view(name), old) for name, old in before.items()))

    trainer = Trainer(
        skeleton.build(folder, weights), Optimizer(OptimizerConfig(lr=1e-2), 0), Progress(weights.arena.control, 8),
        set(weights.names), "frozen", seed=0, between_layers=between,
    )  # fmt: skip
    trainer.step([Item(Encoded([5 + i % 50 for i in range(100)], [False] * 97 + [True] * 3))])
    assert untouched[:6] == [True] * 6, "three layers read the context, and then what is trained"
    assert untouched.count(False) > 3 * 7, "and after each update"


@pytest.fixture
def learner(tmp_path: Path) -> Any:
    folder = llama(tmp_path / "model")
    tokenizer(folder)
    config = load(None, {"state_dir": str(tmp_path / "state"), "governor": {"policy": "strict"},
                         "replay": {"self_texts": 0}, "training": {"threads": 1}})  # fmt: skip
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"text": "w1 w2 w3"}\n')
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.accept_file(path.name, content_hash(path)[0], read_lines(path, 10_000), passes=3)
        yield Learner(load_arena(folder), folder, config, ledger, Curriculum(ledger))


def test_a_busy_server_holds_up_neither_a_rollback_nor_a_stop(learner: Any) -> None:
    """Under `strict` and a load that never ends, a step would never end either."""
    gauge, over = learner.arena.control.new_gauge(), threading.Event()

    def serve() -> None:
        while not over.wait(0.05):
            gauge.set_in_flight(1)

    gauge.set_in_flight(1)
    server = threading.Thread(target=serve)
    server.start()
    try:
        learner.start()
        wait_until(lambda: learner.curriculum.in_flight, "a step is begun")
        assert not learner.quiet(0.5), "and stands aside"
        assert learner.progress.steps == 0
        learner.pause()
        assert learner.quiet(60)
        assert learner.progress.steps == 1
        learner.start()
        wait_until(lambda: learner.curriculum.in_flight, "the next one is begun")
        assert not learner.quiet(0.5)
        assert learner.stop(60)
        assert learner.failure is None
        assert learner.governor.yielded_s > 0.5
    finally:
        over.set()
        server.join()


# --- priorities ------------------------------------------------------------------------------------------------------


def test_only_the_thread_that_asks_gets_low_priority():
    found: list[int] = []

    def low() -> None:
        lower_priority()
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=low)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_gpu_is_limited_when_asked_and_the_operator_has_the_last_word():
    name = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    environment: dict[str, str] = {}
    limit_gpu(TrainingConfig(), environment)
    assert environment == {}
    limit_gpu(TrainingConfig(mps_percent=25), environment)
    assert environment == {name: "25"}
    limit_gpu(TrainingConfig(mps_percent=50), environment)
    assert environment == {name: "25"}


def test_standing_aside_is_no_hang_for_the_watchdog(control):
    gauge = control.new_gauge()
    governor, pulses = Governor(GovernorConfig(policy="strict"), control), []

    def train() -> None:
        with pulse.watched("trainer") as mine:
            pulses.append(mine)
            governor.between_layers()

    gauge.set_in_flight(1)
    thread = threading.Thread(target=train)
    thread.start()
    beats, last, deadline = 0, 0.0, time.monotonic() + 60
    while beats < 3 and time.monotonic() < deadline:
        gauge.set_in_flight(1)
        if pulses:
            silent_s = pulses[0].silent_s
            beats, last = beats + (silent_s < last), silent_s
        time.sleep(0.001)
    governor.hurry()
    thread.join(60)
    assert beats == 3
