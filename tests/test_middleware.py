"""What a server says about the weights that it serves: headers on every response, and /hogwild/status.

The page comes over the real socket from another process, as the engine's does; the application is FastAPI, as vLLM's.
"""

import asyncio
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse, StreamingResponse

from hogwild.arena.client import Arena
from hogwild.errors import ArenaError, UsageError
from hogwild.vllm_plugin import launch, orphan, page
from hogwild.vllm_plugin.middleware import Generation
from hogwild.vllm_plugin.names import PAGE_VARIABLE, SERVER_PID_VARIABLE, URL_VARIABLE
from hogwild.weights import load_arena
from test_permissions import unprivileged
from tiny import Child, llama


def engine(pipe: Any, arena: Arena) -> None:
    page.hand_out(arena)
    pipe.send(("listening", None))
    pipe.recv()


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """An arena whose page another process hands out."""
    environment = launch.environment(Path("s"), Path("d"), [], {}, base_weights=False)
    monkeypatch.setenv(PAGE_VARIABLE, environment[PAGE_VARIABLE])
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    arena = load_arena(llama(tmp_path / "model"))
    child = Child(engine, arena)
    child.hear("listening")
    yield arena
    child.kill()


def application(api_key: list[str] | None = None) -> FastAPI:
    app = FastAPI()
    app.state.args = Namespace(api_key=api_key)

    @app.get("/health")
    async def health() -> PlainTextResponse:
        return PlainTextResponse("")

    app.add_middleware(Generation)
    return app


def get(app: FastAPI, path: str, **arguments: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(arguments.pop("method", "GET"), path, **arguments)

    return asyncio.run(ask())


def test_every_response_says_generation_and_epoch_as_they_are_now(arena):
    app = application()
    for generation, epoch in ((0, 0), (7, 30)):
        arena.control.generation, arena.control.epoch = generation, epoch
        for path in ("/health", "/nowhere"):
            headers = get(app, path).headers
            assert (headers["x-hogwild-generation"], headers["x-hogwild-epoch"]) == (
                str(generation),
                str(epoch),
            )


def test_status_says_what_the_control_page_says(arena):
    app = application()
    answer = get(app, "/hogwild/status").json()
    assert answer["daemon"] == {"alive": False, "age_s": None}
    assert (answer["generation"], answer["trained"], answer["restoring"]) == (0, False, False)
    arena.control.generation, arena.control.epoch, arena.control.steps = 3, 12, 90
    arena.control.mark_trained()
    arena.control.beat_daemon()
    answer = get(app, "/hogwild/status").json()
    assert (answer["generation"], answer["epoch"], answer["steps"], answer["trained"]) == (3, 12, 90, True)
    assert answer["arena"] == arena.control.arena_id
    assert answer["model"] == arena.layout.source.path
    assert answer["daemon"]["alive"]
    assert get(app, "/hogwild/status", method="POST").status_code == 405


@pytest.mark.usefixtures("arena")
@pytest.mark.parametrize("given", ["argument", "environment"])
def test_status_wants_the_servers_api_key(monkeypatch, given):
    """`--middleware` runs before vLLM's own check, which would not guard this path anyway."""
    if given == "environment":
        monkeypatch.setenv("VLLM_API_KEY", "second")
    app = application(["first", "second"] if given == "argument" else None)
    for headers, code in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic second"}, 401),
        ({"Authorization": "second"}, 401),
        ({"Authorization": "Bearer second"}, 200),
        ({"Authorization": "bearer second"}, 200),
    ):
        answer = get(app, "/hogwild/status", headers=headers)
        assert answer.status_code == code, headers
        assert ("arena" in answer.json()) == (code == 200)
    assert get(app, "/health").status_code == 200, "what vLLM leaves open stays open"
    del app.state.args
    assert get(app, "/hogwild/status").status_code == 401, "a vLLM that does not say whether it has a key"


def test_a_stream_passes_through_piece_by_piece(arena):
    arena.control.generation = 4
    app = FastAPI()
    app.state.args = Namespace(api_key=None)
    delivered = asyncio.Event()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> Any:
            yield b"one"
            await asyncio.wait_for(delivered.wait(), 30)  # comes only when the first piece has come out
            yield b"two"

        return StreamingResponse(pieces())

    app.add_middleware(Generation)
    sent: list[Any] = []

    async def run() -> None:
        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body") == b"one":
                delivered.set()

        scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    asyncio.run(run())
    assert [message.get("body") for message in sent if message.get("body")] == [b"one", b"two"]
    assert (b"x-hogwild-generation", b"4") in sent[0]["headers"]


def test_an_engine_that_does_not_answer_is_said_and_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv(PAGE_VARIABLE, f"hogwild-test-{os.getpid()}-{tmp_path.name}")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app = application()
    assert get(app, "/health").headers["x-hogwild-generation"] == "unknown"
    assert get(app, "/hogwild/status").status_code == 503
    child = Child(engine, load_arena(llama(tmp_path / "model")))
    child.hear("listening")

    async def until_known() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            while True:
                said = (await client.get("/health")).headers["x-hogwild-generation"]
                if said != "unknown":
                    return said
                await asyncio.sleep(0.1)

    assert asyncio.run(asyncio.wait_for(until_known(), 60)) == "0"
    child.kill()


@pytest.mark.usefixtures("arena")
def test_the_page_is_not_handed_to_another_user():
    assert unprivileged(page.ask) == "the engine did not hand out its control page"


def sleep(pipe: Any) -> None:
    pipe.recv()


def watch(pipe: Any, server: int) -> None:
    os.environ[SERVER_PID_VARIABLE] = str(server)
    orphan.end_with_server()
    pipe.send(("watching", None))
    pipe.recv()


def test_an_engine_ends_when_its_api_server_is_killed():
    server = Child(sleep)
    engine, alone = Child(watch, server.pid), Child(watch, 0)
    engine.hear("watching")
    alone.hear("watching")
    assert engine.process.is_alive()
    server.kill()
    engine.process.join(60)
    assert engine.process.exitcode == 1
    assert alone.process.is_alive(), "a server of one process has nobody to watch"
    alone.kill()


def test_without_a_launcher_there_is_no_page(monkeypatch):
    monkeypatch.delenv(PAGE_VARIABLE, raising=False)
    with pytest.raises(ArenaError, match="start the server with `hogwild vllm`"):
        page.ask()


def test_the_launcher_names_the_middleware_and_the_state_folder():
    command = launch.command("model", ["--port", "1"])
    assert command[command.index("--middleware") + 1] == f"{Generation.__module__}.{Generation.__name__}"
    first, second = (
        launch.environment(Path("s"), Path("/state"), [], {}, base_weights=base) for base in (False, True)
    )
    assert (first["HOGWILD_STATE_DIR"], first["HOGWILD_BASE_WEIGHTS"]) == ("/state", "0")
    assert second["HOGWILD_BASE_WEIGHTS"] == "1"
    assert first[PAGE_VARIABLE] != second[PAGE_VARIABLE]


def test_plugins_that_somebody_has_chosen_are_joined_by_the_one_that_is_needed():
    def plugins(**base: str) -> str | None:
        environment = launch.environment(Path("s"), Path("d"), [], base, base_weights=False)
        return environment.get("VLLM_PLUGINS")

    assert plugins() is None
    assert plugins(VLLM_PLUGINS="one,two") == "one,two,hogwild"
    assert plugins(VLLM_PLUGINS="hogwild,one") == "hogwild,one"
    assert plugins(VLLM_PLUGINS="") == ",hogwild"


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["--host=::"], "http://127.0.0.1:8000"),
        (["--host", "0.0.0.0", "--port=9000"], "http://127.0.0.1:9000"),
        (["--host", "::1", "--port", "9000"], "http://[::1]:9000"),
        (
            ["--host", "127.0.0.1", "--port", "8000", "--port", "9000", "--host=10.0.0.1"],
            "http://10.0.0.1:9000",
        ),
    ],
)
def test_the_daemon_is_told_where_the_server_listens(arguments, url):
    """Those of the command line come after those of the configuration, and vLLM goes by the last."""
    assert launch.environment(Path("s"), Path("d"), arguments, {}, base_weights=False)[URL_VARIABLE] == url


def test_a_file_of_vllm_counts_and_the_command_line_counts_for_more(tmp_path):
    (theirs := tmp_path / "vllm.yaml").write_text(
        "port: 9000\nhost: 0.0.0.0\nssl_certfile: /c.pem\nenforce-eager: true\nmiddleware: [a.b]\nload-format: auto\n"
    )
    given = ["--config", str(theirs)]
    assert launch.url(given) == launch.url(["--enforce-eager", *given]) == "https://127.0.0.1:9000"
    assert launch.url([*given, "--port", "1"]) == launch.url(["--port=1", *given]) == "https://127.0.0.1:1"
    assert launch.certificate(given) == "/c.pem"
    launch.refuse(given)
    theirs.write_text("uds: /run/vllm.sock\n")
    with pytest.raises(UsageError, match="--uds: the daemon asks the server over TCP"):
        launch.refuse(given)


@pytest.mark.parametrize("text", [None, "a: [", "- a", "", b"a: \xff"])
def test_a_file_of_vllm_that_is_none_is_said_before_it_starts(tmp_path, text):
    theirs = tmp_path / "vllm.yaml"
    if text is not None:
        theirs.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=rf"--config {theirs}, of vLLM: "):
        launch.refuse(["--config", str(theirs)])


def test_the_launcher_leaves_memory_to_the_daemon(tmp_path):
    def cache(*arguments: str, available: int = 8 << 30) -> str:
        found = launch.command("model", arguments, available=available)
        places = [i for i, one in enumerate(found) if one.startswith("--kv-cache-memory-bytes")]
        return " ".join(found[places[0] : places[0] + 2]) if places else ""

    assert cache() == cache("--port", "1") == f"--kv-cache-memory-bytes {2 << 30}"
    assert cache(available=0) == cache("--gpu-memory-utilization=0.5") == ""
    assert cache("--gpu_memory_utilization=0.5") == cache("--gpu_memory_utilization", "0.5") == ""
    (theirs := tmp_path / "vllm.yaml").write_text("port: 1\n")
    assert cache("--config", str(theirs)) == cache()
    theirs.write_text("kv_cache_memory_bytes: 1G\n")
    assert cache("--config", str(theirs)) == ""
    assert cache("--kv-cache-memory-bytes", "1G") == "--kv-cache-memory-bytes 1G"
