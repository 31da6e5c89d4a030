"""Does keeping the weights where they can be trained slow the server down?

    python benchmarks/serving.py [--compile] [--rounds 5]

Starts stock `vllm serve` and `hogwild vllm` side by side on the same model, checks that both answer, and
then loads them in turn, so that whatever else the machine does touches both alike. Prints output tokens per
second as a ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
import support  # noqa: E402 - the processes of the test suite, started as a user starts them
from hogwild import demo_model  # noqa: E402

TOKENS = 48
COMPILING_S = 1800.0
"""How long a server may take until it answers: torch.compile takes minutes on two cores."""
PROMPT = "Explain in a few sentences how a lighthouse warns ships at night, number {}."


def tokens_per_second(server: support.Server, concurrency: int) -> float:
    """Output tokens per second with `concurrency` requests at once, each of exactly TOKENS tokens."""

    def complete(number: int) -> int:
        body = {
            "model": "demo",
            "prompt": PROMPT.format(number),
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600).raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    with ThreadPoolExecutor(concurrency) as pool:
        began = time.perf_counter()
        produced = sum(pool.map(complete, range(concurrency)))
        seconds = time.perf_counter() - began
    assert produced == concurrency * TOKENS, "the server stopped early: the figures would not compare"
    return produced / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="serve with torch.compile instead of eagerly")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.compile:
        support.SERVER_ARGUMENTS = tuple(a for a in support.SERVER_ARGUMENTS if a != "--enforce-eager")
    model = demo_model.build(REPOSITORY / ".demo" / "model")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        servers: dict[str, support.Server] = {}
        try:
            for name, sock in (("stock", None), ("hogwild", root / "arena.sock")):
                servers[name] = support.Server(model, root / f"{name}.log", sock)
                servers[name].wait_ready(COMPILING_S)
            for name, server in servers.items():
                answer = server.ask("What is 2 + 2?")
                assert "4" in answer, f"{name} answers {answer!r}: nothing is timed on a broken server"
            print(
                f"{'requests at once':>16} {'stock tok/s':>12} {'hogwild tok/s':>14} {'ratio':>7}   (rounds)"
            )
            for concurrency in (1, 4, 16):
                rates: dict[str, list[float]] = {name: [] for name in servers}
                for server in servers.values():
                    tokens_per_second(server, concurrency)  # warm
                for _ in range(options.rounds):
                    for name, server in servers.items():
                        rates[name].append(tokens_per_second(server, concurrency))
                ratios = [
                    ours / theirs for ours, theirs in zip(rates["hogwild"], rates["stock"], strict=True)
                ]
                stock, ours = (statistics.median(rates[name]) for name in ("stock", "hogwild"))
                spread = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
                print(f"{concurrency:>16} {stock:>12.1f} {ours:>14.1f} {ours / stock:>7.3f}   ({spread})")
        finally:
            for server in servers.values():
                server.kill()


if __name__ == "__main__":
    main()
