"""No answer comes from keys and values of older weights, and prefix caching stays useful all the same."""

import asyncio
import codecs
import json
import re
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from hogwild import skeleton
from hogwild.apollo import Optimizer
from hogwild.arena.client import Arena
from hogwild.arena.control import ControlPage
from hogwild.arena.hub import Hub
from hogwild.encoding import Encoded
from hogwild.settings import OptimizerConfig
from hogwild.trainer import Item, Progress, Trainer
from hogwild.vllm_plugin import launch, salt
from hogwild.vllm_plugin.middleware import Generation
from hogwild.vllm_plugin.names import SALT_MARK
from hogwild.weights import Weights
from support import Client, Server, environment, wait_until
from tiny import WORDS, chat_model

# --- the salt --------------------------------------------------------------------------------------------------------


@pytest.fixture
def control() -> ControlPage:
    return ControlPage.create(bytes(32))


def of(body: bytes, control: ControlPage) -> Any:
    return json.loads(salt.salted(body, control))


def test_a_salt_is_of_one_epoch_one_arena_and_one_salt_of_the_clients(control):
    other = ControlPage.create(bytes(32))
    salts = []
    for page in (control, other):
        for page.epoch in (0, 1, 2**63):
            for own in (None, "a", "b", "x" * 128, '"'):
                salts.append(salt.compose(page, own))
                assert salts[-1] == salt.compose(page, own)
    assert len(set(salts)) == len(salts)
    control.mark_trained()
    assert salt.compose(control, None) not in salts, (
        "a daemon that is gone may have left weights that have moved"
    )
    control.beat_daemon()
    assert salt.compose(control, None) in salts
    for one in salts:
        assert one.startswith(SALT_MARK)
        assert len(one) <= 128
        assert not set("@/\\\0") & set(one)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(body=st.dictionaries(st.text(), JSON), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_nothing_but_the_salt_changes(body, indent, ascii_only):
    control = ControlPage.create(bytes(32))
    body.pop("cache_salt", None)
    sent = json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    got = salt.salted(sent + b" \n", control)
    assert got.startswith(sent[:-1].rstrip() if body else b"{")
    assert repr(json.loads(got)) == repr({**body, "cache_salt": salt.compose(control, None)})


def test_a_clients_salt_keeps_its_clients_apart(control):
    def found(own: str) -> str:
        return of(json.dumps({"cache_salt": own, "prompt": "x"}).encode(), control)["cache_salt"]

    assert found("mine") == found("mine") != found("yours")
    assert of(b'{"cache_salt": null}', control)["cache_salt"] == salt.compose(control, None)
    # the last one counts where a key comes twice, for us as for vLLM
    assert of(b'{"cache_salt": "a", "cache_salt": "b"}', control)["cache_salt"] == salt.compose(control, "b")
    # nor can a client claim another epoch
    assert found(f"{SALT_MARK}{control.arena_id[:12]}-7") != salt.compose(control, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_every_encoding_that_json_may_have(control, encoding):
    assert of('{"prompt": "ä"}'.encode(encoding), control) == {
        "prompt": "ä",
        "cache_salt": salt.compose(control, None),
    }


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"a": 1,}', b"[1]", b"5", b"null", b'"x"', b"\xff\xfe\xff", b"{}{}", b"[" * 100_000,
     b'{"cache_salt": ""}', b'{"cache_salt": 5}', b'{"cache_salt": "a@b"}', codecs.BOM_UTF8,
     json.dumps({"cache_salt": "x" * 129}).encode()],
    ids=repr,
)  # fmt: skip
def test_what_vllm_refuses_reaches_it_whole(control, body):
    assert salt.salted(body, control) is body


def application(control: ControlPage | None, *, key: str | None = None) -> FastAPI:
    """An application that answers what it was sent; behind a key as vLLM's, inside the middleware."""
    app = FastAPI()
    app.state.args = Namespace(api_key=None)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(request: Request) -> dict[str, Any]:
        body = await request.body()
        await asyncio.sleep(0)
        return {"body": body.decode(), "length": request.scope["headers"]}

    class Key:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if key and dict(scope["headers"]).get(b"authorization") != f"Bearer {key}".encode():
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
            await self.inner(scope, receive, send)

    class Known(Generation):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner)
            self._page, self._about = control, {"gauge": 0}

    app.add_middleware(Key)
    app.add_middleware(Known)
    return app


def post(app: FastAPI, path: str, **arguments: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(path, **arguments)

    return asyncio.run(ask())


def test_bodies_are_salted_on_their_way_in(control):
    app = application(control)
    control.epoch = 3
    for path in sorted(salt.ROUTES):
        assert json.loads(post(app, path, json={"a": 1}).json()["body"]) == {
            "a": 1,
            "cache_salt": salt.compose(control, None),
        }
    for path in ("/tokenize", "/v1/chat/completions/render", "/hogwild"):
        assert json.loads(post(app, path, json={"a": 1}).json()["body"]) == {"a": 1}
    assert post(app, "/v1/completions", content=b"{no json").json()["body"] == "{no json"


def test_large_and_chunked_bodies(control):
    app = application(control)
    text = "äö" * 4_000_000

    async def pieces() -> Any:
        data = json.dumps({"prompt": text}).encode()
        for start in range(0, len(data), 1 << 16):
            yield data[start : start + (1 << 16)]

    for arguments in ({"content": pieces()}, {"json": {"prompt": text}}):
        answer = post(app, "/v1/completions", **arguments).json()
        assert json.loads(answer["body"]) == {"prompt": text, "cache_salt": salt.compose(control, None)}
        lengths = [int(value) for name, value in answer["length"] if name == "content-length"]
        assert lengths == ([] if "content" in arguments else [len(answer["body"].encode())])


def test_a_request_without_the_key_is_refused_unread(control):
    app, asked = application(control, key="k"), False

    async def receive() -> Any:
        nonlocal asked
        asked = True
        return {"type": "http.request", "body": b"{}", "more_body": False}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"], asked) == (401, False)
    assert post(app, "/v1/completions", json={}, headers={"Authorization": "Bearer k"}).status_code == 200


def test_a_client_that_goes_away_in_the_middle_of_its_body(control):
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def run() -> Any:
        return await salt.salting(receive, {"headers": []}, control)()

    assert asyncio.run(run()) == {"type": "http.disconnect"}


def test_the_epoch_is_that_of_the_moment_when_the_body_is_complete(control):
    async def run() -> Any:
        body: asyncio.Queue[Any] = asyncio.Queue()
        receive = salt.salting(body.get, {"headers": []}, control)
        await body.put({"type": "http.request", "body": b"{", "more_body": True})
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        control.epoch = 9
        await body.put({"type": "http.request", "body": b"}"})
        return json.loads((await waiting)["body"])

    assert asyncio.run(run()) == {"cache_salt": salt.compose(control, None)}


def test_prefix_caching_is_left_as_vllm_has_it():
    assert not [word for word in launch.command("model", []) if "prefix-caching" in word]


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_an_epoch_ends_after_so_many_steps(control):
    progress = Progress(control, 4)
    epochs = []
    for _ in range(9):
        progress.moved()
        progress.advance()
        epochs.append(control.epoch)
    assert epochs == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_an_epoch_ends_after_so_many_seconds_if_weights_have_moved(control):
    progress = Progress(control, 1000, 0.2)
    for _ in range(3):
        before = control.epoch
        progress.moved()  # inside a step that may take minutes
        wait_until(lambda before=before: progress.tick() or control.epoch > before, "the epoch ends")
        assert control.epoch == before + 1
        progress._began -= 60
        progress.tick()
        assert control.epoch == before + 1, "nothing has moved since"
    by_steps_alone = Progress(control, 1000)
    by_steps_alone.moved()
    by_steps_alone._began -= 1e9
    before = control.epoch
    by_steps_alone.tick()
    assert control.epoch == before


def test_an_epoch_ends_when_training_comes_to_rest(control):
    progress = Progress(control, 1000)
    progress.settle()
    assert control.epoch == 0
    progress.moved()
    progress.settle()
    progress.settle()
    assert control.epoch == 1


def test_an_epoch_that_a_killed_daemon_has_left_ends_with_the_next_one(control):
    control.mark_trained()
    control.epoch = 5
    Progress(control, 8).settle()
    assert control.epoch == 6


# --- with the real vLLM ----------------------------------------------------------------------------------------------

LONG = " ".join(
    WORDS[7 * i % 50] for i in range(3 * 128 - 2)
)  # three blocks of vLLM's on a CPU, but for two tokens
QUESTION = f"{LONG} w51 w52 w53"  # and a token in the fourth one, which is computed in any case


class Live:
    """A real server of a tiny model, and in this process the daemon's part: its arena, trained step by step."""

    def __init__(self, root: Path) -> None:
        offered: list[Arena] = []
        self.hub = Hub(root / "arena.sock", offered.append, lambda *_: None)
        self.hub.start()
        self.server = Server(
            chat_model(root / "model"), root / "server.log", root / "arena.sock"
        ).wait_ready()
        (self.arena,) = wait_until(lambda: offered, "the server offers its arena")
        weights = Weights(self.arena)
        # What a prefix is remembered by, and nothing else: a stale cache has to give the old answer, not a mixture.
        self.progress = Progress(self.arena.control, 1)
        self.trainer = Trainer(
            skeleton.build(root / "model", weights), Optimizer(OptimizerConfig(lr=3e-3), 0), self.progress,
            {name for name in weights.names if re.search("[kv]_proj", name)}, "full", seed=0,
        )  # fmt: skip

    def end(self) -> None:
        self.server.kill()
        self.hub.stop()

    def learn(self, answer: str) -> None:
        """Until the trainer's own forward pass gives it."""
        ids = self.encode(f"{QUESTION} {answer}")
        example = Encoded(ids, [False] * (len(ids) - 1) + [True])
        for _ in range(500):
            if self.truth() == answer:
                return
            self.trainer.step([Item(example)])
        raise AssertionError(f"{answer} is not learned")

    def encode(self, text: str) -> list[int]:
        answer = httpx.post(f"{self.server.url}/tokenize", json={"model": "demo", "prompt": text}, timeout=60)
        return list(answer.raise_for_status().json()["tokens"])

    @torch.no_grad()
    def truth(self) -> str:
        """The answer with the weights as they are now, without any cache."""
        ids = torch.tensor([self.encode(QUESTION)])
        self.trainer._wide.refresh()
        return WORDS[int(self.trainer.model(ids, use_cache=False).logits[0, -1].argmax()) - 4]

    def ask(self, **body: Any) -> str:
        answer = self.post("/v1/completions", {"prompt": QUESTION, "max_tokens": 1, **body})
        return str(answer["choices"][0]["text"]).strip()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        body = {"model": "demo", "temperature": 0, **body}
        answer = httpx.post(f"{self.server.url}{path}", json=body, timeout=300)
        assert answer.is_success, answer.text
        return answer.json()

    def cache(self) -> tuple[int, int]:
        """(looked up, found) prompt tokens, as vLLM's /metrics counts them."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=60).text
        queries, hits = (
            sum(
                float(value) for value in re.findall(rf"^vllm:prefix_cache_{name}_total.* (\S+)$", text, re.M)
            )
            for name in ("queries", "hits")
        )
        return int(queries), int(hits)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(tmp_path_factory.mktemp("freshness"))
    yield live
    live.end()


def without_epochs(live: Live) -> None:
    """As if nobody salted: the epoch stays what it is, whatever is trained."""
    live.trainer.progress = Progress(live.arena.control, 10**9)
    live.trainer.progress.steps = 1


@pytest.mark.vllm
def test_a_cached_prefix_does_not_hide_what_was_learned(live: Live) -> None:
    """A long prefix is cached; training changes the fact behind it; the next request gets the new answer."""
    assert live.ask() == live.truth()
    for answer in ("w3", "w9"):
        before = live.cache()[1]
        old = live.ask()
        assert live.ask() == old
        assert live.cache()[1] - before >= 384, "the prefix was cached"
        live.learn(answer)
        assert live.ask() == answer != old
    hits = live.cache()[1]
    assert live.ask() == "w9"
    assert live.cache()[1] - hits == 384, "and the new one is cached in its turn"


@pytest.mark.vllm
def test_without_the_salt_the_old_answer_would_come(live: Live) -> None:
    """What makes the test before this one one that can fail: the same, while the epoch stands still."""
    live.learn("w3")
    live.progress.new_epoch()
    assert live.ask() == live.ask() == "w3"
    without_epochs(live)
    live.learn("w9")
    assert live.ask() == "w3", "from keys and values of older weights"
    live.trainer.progress.new_epoch()
    assert live.ask() == "w9"
    live.trainer.progress = live.progress


@pytest.mark.vllm
def test_a_clients_own_salt_still_parts_what_it_parts(live: Live) -> None:
    assert live.ask(cache_salt="one") == live.ask(cache_salt="one")
    hits = live.cache()[1]
    live.ask(cache_salt="two")
    assert live.cache()[1] == hits
    live.ask(cache_salt="one")
    assert live.cache()[1] == hits + 384


@pytest.mark.vllm
def test_log_probabilities_of_a_prompt_never_come_from_the_cache(live: Live) -> None:
    """The check that served equals trained asks for them."""
    live.ask()
    looked_up = live.cache()
    answer = live.post("/v1/completions", {"prompt": QUESTION, "max_tokens": 1, "prompt_logprobs": 0})
    assert len(answer["choices"][0]["prompt_logprobs"]) == 385
    assert live.cache() == looked_up, "not even looked up"


@pytest.mark.vllm
def test_salts_that_vllm_refuses_are_refused_by_vllm(live: Live) -> None:
    for own in ("a", "é\n", "x" * 128, "x" * 129, "", "a@b", "a/b", "a\\b", "a\0", 5, ["a"], True, {}, None):
        body = {"model": "demo", "prompt": "w1", "max_tokens": 1, "cache_salt": own}
        answer = httpx.post(f"{live.server.url}/v1/completions", json=body, timeout=60)
        assert answer.is_success == (own is None or salt._allowed(own)), (own, answer.text)
        assert answer.is_success or "cache_salt" in answer.json()["error"]["message"]


UNSALTED = """
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from hogwild.vllm_plugin import unsalted
def skips(salt, **parameters):
    return Request("r", [1], SamplingParams(**parameters), None, cache_salt=salt).skip_reading_prefix_cache
assert not skips(None), "vLLM reads its cache"
unsalted.install()
unsalted.install()
assert skips(None) and skips("") and skips("mine")
assert not skips("hogwild-0123-1")
assert skips("hogwild-0123-1", prompt_logprobs=0)
"""


@pytest.mark.vllm
def test_requests_that_carry_no_epoch_read_no_cache() -> None:
    subprocess.run([sys.executable, "-c", UNSALTED], check=True, env=environment())


@pytest.mark.vllm
def test_the_routes_are_those_of_the_server(live: Live) -> None:
    """Every route of a real server whose body may hold `cache_salt`, but for those that never ask the engine."""
    api = httpx.get(f"{live.server.url}/openapi.json", timeout=60).json()

    def salted_by(schema: Any, seen: frozenset[str]) -> bool:
        text = json.dumps(schema)
        names = set(re.findall(r"#/components/schemas/([^\"]+)", text)) - seen
        return '"cache_salt"' in text or any(
            salted_by(api["components"]["schemas"][name], seen | names) for name in names
        )

    found = {
        path
        for path, methods in api["paths"].items()
        if salted_by(methods.get("post", {}).get("requestBody", {}), frozenset())
    }
    without_engine = {path for path in found if path.endswith(("/render", "/derender", "/count_tokens"))}
    assert found >= {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
    assert found - without_engine <= salt.ROUTES


@pytest.mark.vllm
def test_chats_completions_and_responses_streamed_and_not_across_epochs(live: Live) -> None:
    """A short version of `make bench-freshness`."""
    client = Client(live.server.url)
    try:
        for epoch in range(10):
            live.learn(("w3", "w9")[epoch % 2])
            chat = [{"role": "user", "content": QUESTION}]
            live.post("/v1/chat/completions", {"messages": chat, "max_tokens": 4})
            live.post("/v1/responses", {"input": QUESTION, "max_output_tokens": 4})
            assert live.ask() == live.truth()
    finally:
        client.stop()
    assert client.answers
    assert not client.faults
    error = httpx.post(f"{live.server.url}/v1/completions", content=b"{no json", timeout=60)
    assert error.status_code in (400, 422)
    assert "error" in error.json()


@pytest.mark.vllm
def test_what_the_server_has_to_do_is_on_the_control_page(live: Live) -> None:
    """By the middleware and by vLLM's own statistics, for the governor to look at."""
    control = live.arena.control
    wait_until(lambda: not control.busy, "nobody asks")
    before = control.load
    assert (before.in_flight, before.running, before.waiting) == (0, 0, 0)
    body = {"model": "demo", "prompt": "w1", "max_tokens": 200, "ignore_eos": True, "stream": True}
    asked, enough = 0, threading.Event()

    def ask() -> None:
        nonlocal asked
        while not enough.is_set():
            asked += 1
            with httpx.stream(
                "POST", f"{live.server.url}/v1/completions", json=body, timeout=300
            ) as response:
                response.read()

    client = threading.Thread(target=ask)
    client.start()
    try:
        wait_until(
            lambda: control.busy and (control.load.in_flight, control.load.running) == (1, 1),
            "one is answered",
        )
    finally:
        enough.set()
        client.join()
    wait_until(lambda: not control.busy, "the answer is complete")
    after = control.load
    assert after.tokens - before.tokens == 199 * asked, "all but the first came after another one"
    assert after.waited_s > before.waited_s
    status = httpx.get(f"{live.server.url}/hogwild/status", timeout=60).json()
    assert status["load"]["tokens"] == after.tokens
    with httpx.stream("POST", f"{live.server.url}/v1/completions", json=body, timeout=300) as response:
        next(response.iter_lines())
    wait_until(lambda: not control.busy, "a client that hung up does not count")
