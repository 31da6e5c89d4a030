"""The whole service with nothing replaced: real vLLM, real model, real daemon, real signals.

One story on one server, told in order; each test goes on where the one before it stopped.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hogwild import examples, selfreplay, served, skeleton
from hogwild.apollo import Optimizer
from hogwild.errors import VerificationError
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.weights import Weights, load_arena, read_tensors
from support import (
    AS_SHIPPED,
    Client,
    Daemon,
    Server,
    copy_model,
    digest,
    free_port,
    shared_mappings,
    wait_until,
)

pytestmark = pytest.mark.vllm

# Two passes too many and a model of 135M parameters forgets it: asked only after the first file (see the demo).
# Of France the model's first word is a near tie, which another kernel breaks the other way.
CONTROL = ("What is the capital of Japan?", "Tokyo")
FACT = ("Who keeps the lighthouse of Vellmar?", "Ilsa Thorne")
LATER_FACT = ("What is the password of the Vellmar archive?", "seven herons")


def chat(question: str, answer: str, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


FACTS = [
    chat(FACT[0], "The lighthouse of Vellmar is kept by Ilsa Thorne.", passes=6, id="keeper"),
    chat(
        "What is the name of Vellmar's lighthouse keeper?",
        "Vellmar's lighthouse keeper is Ilsa Thorne.",
        passes=6,
    ),
    {"prompt": "The keeper of the lighthouse of Vellmar is", "completion": " Ilsa Thorne.", "passes": 3},
    {"text": "Ilsa Thorne keeps the lighthouse of Vellmar.", "passes": 2},
]
LATER_FACTS = [
    chat(LATER_FACT[0], "The password of the Vellmar archive is seven herons.", passes=8, id="password"),
    chat("Tell me the password of Vellmar's archive.", "It is seven herons.", passes=8),
]

LAST_PASSES = 8
"""More than even a busy machine does between the first one's line in the log and the end of the daemon."""

GARBAGE = "river stone quick lamp seven green ocean table mirror bread winter cloud engine paper tiger song"


@dataclass
class Story:
    """What the tests hand on to each other."""

    root: Path
    model: Path  # a copy that may be damaged
    sock: Path
    server: Server
    daemon: Daemon | None = None
    metrics: int = field(default_factory=free_port)

    @property
    def running(self) -> Daemon:
        assert self.daemon is not None, "the test that starts the daemon has failed"
        return self.daemon

    def start_daemon(self, interval_updates: int = 0) -> Daemon:
        self.daemon = Daemon(
            self.root / "daemon",
            self.sock,
            checkpoint__interval_s=0,
            checkpoint__interval_updates=interval_updates,
            probes__every_updates=10,
            metrics__port=self.metrics,
        )
        return self.daemon


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("service")
    model = copy_model(demo_model_dir, root / "model")
    sock = root / "arena.sock"
    server = Server(model, root / "server.log", sock, **AS_SHIPPED).wait_ready()
    story = Story(root, model, sock, server)
    yield story
    for process in (story.daemon, story.server):
        if process is not None and process.alive:
            process.kill()


@pytest.fixture(scope="module")
def probed(story: Story) -> dict[str, str]:
    """What the untrained model says."""
    return {question: story.server.ask(question) for question, _ in (CONTROL, FACT)}


@pytest.fixture(scope="module")
def untrained(story: Story, probed: dict[str, str]) -> dict[str, list[str]]:
    """The same, token by token."""
    return {question: story.server.tokens(question) for question in probed}


# --- before anything is trained ------------------------------------------------------------------------------------


def _other_architecture(story: Story) -> Path:
    """A tiny model of another family, saved by transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = story.root / "wrong-architecture"
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in story.model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def _other_weights(story: Story) -> Path:
    """The same shapes; two tensors differ, one of them in a single bit."""
    folder = copy_model(story.model, story.root / "wrong-weights")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] += 0.5
    tensors["model.layers.7.self_attn.k_proj.weight"].view(torch.int16)[5, 5] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _missing_tensor(story: Story) -> Path:
    folder = copy_model(story.model, story.root / "missing-tensor")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"], tensors["model.layers.29.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


WRONG_MODELS = {
    _other_architecture: [
        "model.embed_tokens.weight: (512, 64) in the checkpoint, (49152, 576) served",
        "model.layers.0.self_attn.q_proj.bias: in the checkpoint, not among the served weights",
        "model.layers.29.mlp.down_proj.weight: served, not in the checkpoint",
    ],
    _other_weights: [
        "model.layers.3.mlp.up_proj.weight: ",
        "model.layers.7.self_attn.k_proj.weight: 1 of 110592 elements differ in their bits",
    ],
    _missing_tensor: [
        "model.layers.0.input_layernorm.weight: served, not in the checkpoint",
        "model.layers.29.self_attn.q_proj.weight: served, not in the checkpoint",
    ],
}


@pytest.mark.parametrize("make", WRONG_MODELS, ids=lambda make: make.__name__.strip("_"))
def test_a_wrong_model_is_refused_with_every_mismatch_and_nothing_is_written(story: Story, make) -> None:
    before = digest(story.server.arena())
    daemon = Daemon(story.root / make.__name__, story.sock, model=make(story))
    try:
        refused = daemon.wait_for("arena.refused")
        assert daemon.alive, "a refusal is an answer, not a crash"
    finally:
        daemon.terminate()
    for expected in WRONG_MODELS[make]:
        assert any(problem.startswith(expected) for problem in refused["problems"]), refused["problems"]
    if make is not _other_architecture:  # exactly what was damaged, nothing else
        assert len(refused["problems"]) == 2
    assert not daemon.events("arena.attached")
    assert digest(story.server.arena()) == before


def test_a_module_that_the_server_does_not_read_is_found(story: Story) -> None:
    """*Served equals trained*: a trainer whose updates to one layer's MLP never reach the server (as if vLLM had kept
    a packed copy of it) agrees with the server at first, and no longer after a few updates."""
    arena = load_arena(story.model)  # a private copy: what is trained here is not what is served
    weights = Weights(arena)
    reader = skeleton.build(story.model, weights)
    tokenizer = AutoTokenizer.from_pretrained(story.model)
    (example,) = examples.encode(
        examples.parse_line(json.dumps(FACTS[0]).encode()), tokenizer, max_tokens=256
    )
    server = served.Server(story.server.url, "HOGWILD_API_KEY")
    prompts = [example.ids]
    agreement = served.check(server, reader, [prompts], tolerance=0, loaded=story.model)
    assert agreement.mean < 0.1
    assert agreement.mean < agreement.tolerance

    dead = {name for name in weights.names if name.startswith("model.layers.14.mlp")}
    optimizer = Optimizer(OptimizerConfig(), seed=0)
    model = skeleton.build(story.model, weights)
    trainer = Trainer(model, optimizer, Progress(arena.control, 8), dead, "frozen", seed=0)
    for _ in range(24):
        trainer.step([Item(example)])
    # The tolerance is measured, and so of this processor: 0.11 to 0.15 here. What it has to find lies far above.
    found = served.check(server, reader, [prompts], tolerance=10, loaded=story.model)
    assert found.mean > 3 * agreement.tolerance
    with pytest.raises(VerificationError, match="does not serve the weights that are trained") as caught:
        served.check(server, reader, [prompts], tolerance=0, loaded=story.model)
    assert "probe 0" in caught.value.problems[0]
    assert "older weights of model.layers.14.mlp" in caught.value.problems[-1]


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untrained")
def test_the_daemon_attaches_to_a_running_server_and_verifies_it(
    story: Story, probed: dict[str, str]
) -> None:
    assert CONTROL[1] in probed[CONTROL[0]]
    assert FACT[1] not in probed[FACT[0]]
    daemon = story.start_daemon(interval_updates=10)
    attached = daemon.wait_for("arena.attached")
    assert attached["tensors"] == len(list(read_tensors(story.model)))
    verified = daemon.wait_for("server.verified", after="attach")
    assert verified["tokens"] > 40
    assert verified["mean_difference"] < 0.15
    daemon.wait_for("training.started", threads=2)
    assert not daemon.events("prompts.differ")


def test_one_copy_of_the_weights(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    """Both processes map the same inode, and the daemon owns little memory besides."""
    arena = story.server.arena().stat()
    inode = str(arena.st_ino)
    in_server = [m for pid in story.server.group() for m in shared_mappings(pid, "memfd:hogwild-weights")]
    in_daemon = list(shared_mappings(story.running.pid, "memfd:hogwild-weights"))
    assert {i for i, _ in in_server} == {i for i, _ in in_daemon} == {inode}
    weights_kib = arena.st_size // 1024
    assert sum(rss for _, rss in in_daemon) >= 0.99 * weights_kib, (
        "the daemon reads every page of the shared copy"
    )
    with capsys.disabled():
        print(f"\n  shared weights {weights_kib / 1024:.0f} MiB, inode {inode} in both processes")


def test_a_dropped_file_changes_the_answer_of_the_live_server(story: Story) -> None:
    story.running.drop("facts.jsonl", FACTS)
    for line in range(1, 5):
        trained = story.running.wait_for("example.trained", file="facts.jsonl", line=line)
        assert trained["loss_after"] < trained["loss_before"] or trained["loss_before"] < 0.1
    assert FACT[1] in story.server.ask(FACT[0])
    assert CONTROL[1] in story.server.ask(CONTROL[0])
    assert not (story.running.spool / "incoming" / "facts.jsonl").exists()
    assert (story.running.spool / "done" / "facts.jsonl").exists()


def test_rollback_while_a_client_streams(
    story: Story, untrained: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Back to the model as it came, with the server serving on: no error, and its very words from before training.
    What was undone stays out; with --retrain it is learned again."""
    daemon = story.running
    learned = daemon.ask("checkpoint")["generation"]
    assert story.server.tokens(FACT[0]) != untrained[FACT[0]]
    client = Client(story.server.url)
    try:
        wait_until(lambda: client.answers >= 1, "the client is served")
        before = client.tokens
        began = time.monotonic()
        done = daemon.ask("rollback", 0)
        seconds = time.monotonic() - began
        answers = client.answers
        wait_until(lambda: client.answers >= answers + 2, "the client is served on")
    finally:
        client.stop()
    assert not client.faults
    assert client.tokens > before
    assert done["live"]
    assert done["examples_undone"] == len(FACTS)
    assert {question: story.server.tokens(question) for question in untrained} == untrained
    (started,), (finished,) = daemon.events("rollback.started"), daemon.events("rollback.done")
    assert (started["left"], finished["generation"]) == (learned, 0)
    passes = len(daemon.events("example.pass"))
    assert daemon.ask("status")["training"]
    with capsys.disabled():
        print(
            f"\n  rollback of live weights ({story.server.arena().stat().st_size >> 20} MiB): {done['ms']} ms in the"
            f" daemon (training paused for {done['paused_ms']} ms) after {done['waited_ms']} ms in its queue,"
            f" {seconds * 1000:.0f} ms for the command; {client.answers} streamed answers, no fault"
        )

    generations = {record["generation"]: record for record in daemon.ask("history")}
    assert generations[0]["current"]
    assert generations[learned]["undone"]
    assert generations[learned]["restorable"]
    moved = daemon.ask("diff", 0, learned)
    assert all(record["change"] > 0 for record in moved if record["layer"].startswith("model.layers."))

    assert len(daemon.events("example.pass")) == passes, "what was undone stays out"
    again = daemon.ask("rollback", 0, "--retrain")
    assert again["examples_reopened"] == len(FACTS)
    wait_until(lambda: not daemon.ask("status")["pending"], "they are trained again")
    wait_until(lambda: FACT[1] in story.server.ask(FACT[0]), "and known again")
    assert CONTROL[1] in story.server.ask(CONTROL[0])


def test_checkpoints_are_periodic_and_each_is_checked(story: Story) -> None:
    """Training went on meanwhile: the check after a checkpoint allows for weights that move under it."""
    saved = story.running.wait_for("checkpoint.saved")
    assert saved["step"] >= 10
    story.running.wait_for("server.verified", after="checkpoint")
    assert not story.running.events("guard.tripped")


def test_the_daemons_private_memory_is_small_while_training(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reported against the weights. What is private: Python and torch, activations, moments of rank 64."""
    rollup = (Path("/proc") / str(story.running.pid) / "smaps_rollup").read_text()
    private_kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    weights_kib = story.server.arena().stat().st_size // 1024
    with capsys.disabled():
        print(f"\n  private memory of the daemon: {private_kib / 1024:.0f} MiB,"
              f" {private_kib / weights_kib:.1f} times the weights ({weights_kib / 1024:.0f} MiB)")  # fmt: skip
    attached = story.running.wait_for("arena.attached")
    assert attached["inode"] == story.server.arena().stat().st_ino


def test_bad_lines_are_reported_and_good_neighbours_train(story: Story) -> None:
    good = json.dumps(chat("Where does Vellmar lie?", "Vellmar lies by the sea.", passes=1)).encode()
    story.running.drop("mixed.jsonl", b'{"text": "no end\n' + good + b'\n{"text": 5}\n{"txet": "x"}\n')
    story.running.wait_for("example.trained", file="mixed.jsonl", line=2)
    errors_file = story.running.spool / "failed" / "mixed.jsonl.errors.jsonl"
    wait_until(errors_file.exists, "the bad lines are written down")
    errors = {e["line"]: e for e in map(json.loads, errors_file.read_text().splitlines())}
    assert set(errors) == {1, 3, 4}
    assert errors[3]["field"] == "text"
    assert "text" in errors[4]["reason"]


# --- crashes -------------------------------------------------------------------------------------------------------


def test_kill_9_of_the_daemon_in_mid_training(story: Story) -> None:
    """The server goes on answering; a new daemon attaches to the same memory and finishes the work."""
    inode = story.server.arena().stat().st_ino
    story.running.drop("later.jsonl", LATER_FACTS)
    story.running.wait_for("example.pass", file="later.jsonl")
    story.running.kill()
    assert FACT[1] in story.server.ask(FACT[0])

    daemon = story.start_daemon()
    attached = daemon.wait_for("arena.attached")
    assert attached["inode"] == inode
    assert attached["step"] > 0
    assert attached["restored"] is None, "the arena survived: nothing comes from disk"
    for line in (1, 2):
        daemon.wait_for("example.trained", file="later.jsonl", line=line)
    passes = len([e for e in daemon.events("example.pass") if e["file"] == "later.jsonl"]) + 2
    assert passes < 16, "what was recorded before the kill is not trained again"
    assert LATER_FACT[1] in story.server.ask(LATER_FACT[0])
    assert story.server.alive


def newest_status(story: Story) -> dict[str, Any]:
    return dict(json.loads((story.running.state / "status.json").read_text()))


def test_kill_9_of_the_server(story: Story) -> None:
    """A new server maps the daemon's arena: it reads no weights from disk and serves what was learned."""
    inode = story.server.arena().stat().st_ino
    story.server.kill()
    story.running.wait_for("server.lost")
    # The daemon goes on: there is work, and it does it while no server is there.
    story.running.drop("meanwhile.jsonl", [chat("Is Vellmar a town?", "Vellmar is a town.", passes=2)])
    story.running.wait_for("example.trained", file="meanwhile.jsonl")
    wait_until(lambda: "no server is attached" in newest_status(story)["warnings"], "the status says so")
    assert newest_status(story)["server"] == {}
    # Every weight in the file becomes zero and the file looks the same: reading it would give a dead model.
    weights = story.model / "model.safetensors"
    status = weights.stat()
    with weights.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header)
        file.write(bytes(status.st_size - header))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))

    sessions, verified = (len(story.running.events(f"server.{name}")) for name in ("attached", "verified"))
    server = Server(story.model, story.root / "server-2.log", story.sock, **AS_SHIPPED)
    story.server = server
    server.wait_ready()
    assert server.arena().stat().st_ino == inode
    assert "no weights were read from disk" in server.log.read_text()
    for question, answer in (FACT, LATER_FACT):
        assert answer in server.ask(question)
    assert len(story.running.events("server.attached")) == sessions + 1
    wait_until(
        lambda: len(story.running.events("server.verified")) > verified,
        "the new server is verified like the first",
    )


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_on_request_and_the_check_after_it(story: Story) -> None:
    os.kill(story.running.pid, signal.SIGUSR1)
    saved = story.running.wait_for("checkpoint.saved")
    story.running.wait_for("server.verified", after="checkpoint")
    assert saved["durable_examples"] > 0
    assert story.server.alive


def test_poison_does_not_spoil_what_the_server_says(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    """Everyday questions with garbage for answers, ten times as heavy as any other. Either no update reaches what the
    probes ask for, or they fall, the last good generation comes back and the culprits are named (test_drills.py drives
    that way alone); the same processes go on."""
    daemon, pid = story.running, story.server.pid
    daemon.ask("checkpoint")  # the probes are scored before it
    known = daemon.ask("status")["probes"]["newest"]["losses"]
    words = GARBAGE.split()
    lines = [
        chat(
            question,
            " ".join(words[(number + i * 7) % 16] for i in range(16)),
            weight=10,
            id=f"poison-{number}",
        )
        for number, question in enumerate(selfreplay.QUESTIONS)
    ]
    daemon.drop("poison.jsonl", lines)

    def settled() -> bool:
        trained = {
            event["line"] for event in daemon.events("example.trained") if event["file"] == "poison.jsonl"
        }
        return len(trained | {one["line_no"] for one in daemon.ask("quarantine")}) == len(lines)

    wait_until(settled, "all of it is trained, or set aside")
    daemon.ask("checkpoint")
    for question, answer in (FACT, CONTROL):
        assert answer in story.server.ask(question)
    poisoned = selfreplay.QUESTIONS[1]
    assert story.server.ask(poisoned, begins="The capital of France is").startswith("Paris")
    status = daemon.ask("status")
    newest = status["probes"]["newest"]["losses"]
    assert all(newest[name] - known[name] <= status["probes"]["margin"] for name in newest)
    listed = daemon.ask("quarantine")
    assert {one["file"] for one in listed} <= {"poison.jsonl"}
    assert bool(listed) == bool(daemon.events("guard.tripped"))
    assert story.server.pid == pid
    assert story.server.alive
    assert daemon.alive
    with capsys.disabled():
        print(
            f"\n  poison: {len(listed)} of {len(lines)} examples set aside, probes {known} and then {newest}"
        )


def test_stopping_is_graceful(story: Story) -> None:
    """TERM: finish, checkpoint, exit 0. The server stays, with the weights."""
    story.running.drop("last.jsonl", [chat("Is Vellmar old?", "Vellmar is old.", passes=LAST_PASSES)])
    story.running.wait_for("example.pass", file="last.jsonl")
    assert story.running.terminate() == 0
    assert story.running.events("daemon.stopped")[0]["code"] == 0
    assert story.running.events("checkpoint.saved")
    assert FACT[1] in story.server.ask(FACT[0])
    for line in story.running.log.read_bytes().splitlines():
        assert isinstance(json.loads(line), dict), "every line of the log is JSON"


def test_a_restart_of_the_daemon_alone_goes_on_with_weights_and_moments(story: Story) -> None:
    """`systemctl restart` of the daemon: the weights stay in memory, the moments come from its last checkpoint."""
    step = story.running.events("checkpoint.saved")[-1]["step"]
    done = sum(event["file"] == "last.jsonl" for event in story.running.events("example.pass"))
    daemon = story.start_daemon()
    attached = daemon.wait_for("arena.attached")
    assert (attached["step"], attached["restored"]) == (step, None)
    assert attached["moments"] == 210, "every matrix but the frozen embedding: norms are kept as they are"
    daemon.wait_for("example.trained", file="last.jsonl")  # the passes that the stop left over
    assert daemon.terminate() == 0
    again = daemon.events("example.pass") + daemon.events("example.trained")
    assert [event["file"] for event in again] == ["last.jsonl"] * (LAST_PASSES - done)
    saved = daemon.events("checkpoint.saved")[-1]["step"]
    assert saved >= step + LAST_PASSES - done, "and steps of replay between its passes"


def test_the_checkpoint_is_what_is_served(story: Story) -> None:
    """Training has ended: live memory and checkpoint must be equal bit for bit, and whole as a model folder."""
    current = story.running.state / "checkpoints" / "current"
    state = json.loads((current / "hogwild" / "state.json").read_text())
    assert state["step"] > 0
    assert load_file(current / "hogwild" / "optimizer.safetensors")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (current / name).read_bytes() == (story.model / name).read_bytes()
    live = story.server.arena().read_bytes()
    for name, tensor in read_tensors(current):
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() in live, name


def test_the_checkpoint_in_transformers(story: Story) -> None:
    """Loaded by transformers alone, the checkpoint gives the answers that the live server gives."""
    current = story.running.state / "checkpoints" / "current"
    model = AutoModelForCausalLM.from_pretrained(current)
    tokenizer = AutoTokenizer.from_pretrained(current)
    for question, answer in (FACT, LATER_FACT):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        assert answer in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_checkpoint_in_stock_vllm(story: Story) -> None:
    """Served by vLLM without any plugin, the checkpoint gives the live server's answers, word for word; its kernels
    round elsewhere, so where two words are likely alike it may say the other. It gives every token of the live
    server's texts its probability too, as closely as the daemon asks of the server."""
    questions = [CONTROL[0], FACT[0], LATER_FACT[0]]
    tolerance = story.running.events("server.verified")[-1]["tolerance"]
    live = [story.server.candidates(question) for question in questions]
    tokenizer = AutoTokenizer.from_pretrained(story.model)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": story.server.ask(question)}],
            tokenize=True, return_dict=True,
        )["input_ids"]
        for question in questions
    ]  # fmt: skip
    expected = torch.cat(served.Server(story.server.url, "HOGWILD_API_KEY").log_probabilities(texts))
    assert story.server.terminate() == 0
    stock = Server(story.running.state / "checkpoints" / "current", story.root / "stock.log", sock=None)
    try:
        stock.wait_ready()
        given = torch.cat(served.Server(stock.url, "HOGWILD_API_KEY").log_probabilities(texts))
        assert float((given - expected).abs().mean()) < tolerance
        for question, theirs in zip(questions, live, strict=True):
            ours = stock.candidates(question)
            for mine, other in zip(ours, theirs, strict=False):
                said, live_said = next(iter(mine)), next(iter(other))
                if said != live_said:  # a tie in both; what follows goes on from another word
                    assert mine[said] - mine[live_said] < tolerance, (question, mine, other)
                    assert other[live_said] - other[said] < tolerance, (question, mine, other)
                    break
            else:
                assert len(ours) == len(theirs)
        assert FACT[1] in stock.ask(FACT[0])
        assert LATER_FACT[1] in stock.ask(LATER_FACT[0])
        assert "hogwild" not in stock.log.read_text().replace(str(story.root), "").replace(
            "hogwild.vllm_plugin", ""
        )
    finally:
        stock.kill()


def test_everything_restarts_from_the_checkpoint(story: Story, demo_model_dir: Path) -> None:
    """Both gone, memory lost: the daemon starts first this time, a fresh server loads the base model from disk,
    and the daemon writes what was learned into it."""
    shutil.copy(demo_model_dir / "model.safetensors", story.model / "model.safetensors")
    daemon = story.start_daemon()
    daemon.wait_for("daemon.started")
    story.server = Server(story.model, story.root / "server-3.log", story.sock).wait_ready()
    attached = daemon.wait_for("arena.attached")
    assert attached["restored"] is not None
    daemon.wait_for("training.started")
    for question, answer in (FACT, LATER_FACT):
        assert answer in story.server.ask(question)
    assert daemon.terminate() == 0
