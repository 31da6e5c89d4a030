"""Served equals trained: the server's own log-probabilities against the trainer's forward pass on the same weights.

Bit-for-bit comparison of tensors cannot see a module that the server no longer reads (a packed copy, a cast, a second
head). A module that went dead shows here, as a difference that grows with every update.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import PreTrainedModel

from hogwild import disagreement, tls
from hogwild.errors import HogwildError, VerificationError
from hogwild.plural import counted

PROBE_TEXTS = (
    "The capital of France is Paris, and the Seine runs through it from east to west.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Water boils at one hundred degrees Celsius at sea level, and at a lower temperature on a mountain.",
)
MAX_PROBE_TOKENS = 256
_TIMEOUT_S = 120.0


class ServerError(HogwildError):
    """The server cannot be asked right now (starting, busy, gone, or another API key)."""


class Server:
    """vLLM's OpenAI-compatible API, as far as verification needs it.

    Args:
        certificate: file of the one that it shows; empty: unknown.
        named: a person wrote the URL, and not the server itself. Both: see `tls.context`.
        max_model_len: tokens of the longest text that it takes, with what it answers; None: it has not said.

    Attributes:
        longest: tokens of the longest text that it gives log-probabilities of: it answers with one token at least.

    Raises:
        ServerError: nobody can be asked by that URL, or with that key.
    """

    def __init__(
        self,
        url: str,
        api_key_env: str,
        certificate: str = "",
        *,
        named: bool = False,
        max_model_len: int | None = None,
    ) -> None:
        self.url, self._key_name = url, api_key_env
        self.longest = min(MAX_PROBE_TOKENS, (max_model_len or MAX_PROBE_TOKENS + 1) - 1)
        key = os.environ.get(api_key_env, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(
                base_url=url.rstrip("/"),
                headers=headers,
                timeout=_TIMEOUT_S,
                trust_env=False,
                verify=tls.context(certificate, named=named),
            )
        except OSError as error:
            raise ServerError(
                f"{url} cannot be asked: its certificate {certificate} cannot be read: {error.strerror or error}; the "
                "daemon has to see it where the server does"
            ) from error
        except (httpx.InvalidURL, ValueError) as error:
            raise ServerError(f"{url} cannot be asked: {error}") from error
        self._model = ""

    def ready(self) -> bool:
        """Does the server answer requests?

        Raises:
            ServerError: it never will, asked like this.
        """
        if not self.url:
            raise ServerError(
                "the server cannot be asked: it does not say where it answers; start it with `hogwild vllm`, or set "
                "`server.url`"
            )
        try:
            return self._client.get("/health", timeout=2.0).is_success
        except httpx.HTTPError as error:
            if why := tls.failed(error):
                raise ServerError(
                    f"{self.url} cannot be asked: {why}; is its certificate that of this address, valid, and one "
                    "that needs none from a client? (docs/operations.md, TLS)"
                ) from error
            return False

    def log_probabilities(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-probability of each token after the first, for each prompt of token ids.

        Raises:
            ServerError: the server cannot be reached or refuses.
        """
        try:
            if not self._model:
                self._model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
            answer = self._client.post(
                "/v1/completions",
                json={
                    "model": self._model,
                    "prompt": [list(prompt) for prompt in prompts],
                    "max_tokens": 1,
                    "temperature": 0,
                    "prompt_logprobs": 0,
                },
            ).raise_for_status()
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            return [
                torch.tensor(
                    [
                        entry[str(token)]["logprob"]
                        for token, entry in zip(prompt[1:], logprobs[1:], strict=True)
                    ]
                )
                for prompt, logprobs in zip(prompts, (c["prompt_logprobs"] for c in choices), strict=True)
            ]
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            self._model = ""  # a restarted server may have given its model another name
            body = ""
            if isinstance(error, httpx.HTTPStatusError):
                body = error.response.text[:500]
                if error.response.status_code in (401, 403):
                    body += f"; the environment variable {self._key_name} has to hold its API key"
            raise ServerError(f"{self.url} gave no log-probabilities: {error!r} {body}") from error

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """The token ids of what the model is sent for a chat; None: it does not say (a proxy), or has no chat
        template."""
        try:
            asked = {"model": self._model or None, "messages": list(messages)}
            answer = self._client.post("/tokenize", json=asked).raise_for_status()
            return [int(token) for token in answer.json()["tokens"]]
        except (httpx.HTTPError, LookupError, TypeError, ValueError):
            return None


@dataclass
class Agreement:
    """How well server and trainer agree: differences of log-probability in nats."""

    mean: float
    largest: float
    tokens: int
    tolerance: float
    """For all tokens together."""


def check(
    server: Server,
    model: PreTrainedModel,
    groups: Sequence[Sequence[Sequence[int]]],
    tolerance: float,
    loaded: Path,
) -> Agreement:
    """Compare the server with the trainer's forward pass on groups of texts, each group as a whole.

    The trainer runs before and after the server: while threads train, the server's value may lie anywhere between.

    Args:
        groups: of token ids, of which as much is compared as the server takes. A short text alone says little: its
            mean scatters.
        tolerance: mean difference in nats that is accepted; 0: measured, see `disagreement.tolerance` and
            `allowed`.
        loaded: folder of the checkpoint that the server was filled from: what a module has that it no longer reads.

    Raises:
        VerificationError: a group's mean difference exceeds the tolerance; its texts that do are listed, and the
            modules that explain it.
        ServerError: the server cannot be asked.
    """
    groups = [[prompt[: server.longest] for prompt in group] for group in groups if group]
    prompts = [prompt for group in groups for prompt in group]
    before = [trained_log_probabilities(model, prompt) for prompt in prompts]
    served = server.log_probabilities(prompts)
    after = [trained_log_probabilities(model, prompt) for prompt in prompts]
    given = tolerance
    tolerance = tolerance or disagreement.tolerance(model, prompts, trained_log_probabilities)
    distances = [
        torch.maximum(torch.minimum(b, a) - s, s - torch.maximum(b, a)).clamp_(min=0)
        for b, s, a in zip(before, served, after, strict=True)
    ]
    problems, start = [], 0
    for group in groups:
        numbers = range(start, start := start + len(group))
        together = torch.cat([distances[number] for number in numbers])
        allowed = given or disagreement.allowed(tolerance, torch.cat([before[number] for number in numbers]))
        if float(together.mean()) <= allowed:
            continue  # not so for NaN
        for number in numbers:
            distance, s = distances[number], served[number]
            if not float(distance.mean()) <= allowed:
                worst = int(distance.argmax())
                problems.append(
                    f"probe {number}: mean difference {float(distance.mean()):.3f} nats over "
                    f"{counted(len(s), 'token')} (tolerance {allowed:.3f}), worst at token {worst}: "
                    f"served {float(s[worst]):.3f}, trained {float(before[number][worst]):.3f}"
                )
    if problems:
        worst = max(range(len(prompts)), key=lambda number: float(distances[number].mean()))
        problems.append(_blame(model, loaded, prompts[worst], served[worst]))
        raise VerificationError(
            f"{server.url} does not serve the weights that are trained; some module of it reads other memory",
            problems,
        )
    together = torch.cat(distances)
    return Agreement(float(together.mean()), float(together.max()), together.numel(), tolerance)


def _blame(model: PreTrainedModel, loaded: Path, prompt: Sequence[int], answer: torch.Tensor) -> str:
    try:
        found = disagreement.suspects(model, loaded, prompt, answer, trained_log_probabilities)
    except (HogwildError, OSError) as error:
        return (
            f"which module it is cannot be told without the weights that the server was loaded with: {error}"
        )
    if found:
        return f"the server seems to read older weights of {', '.join(found[:3])}: those in {loaded} explain its answer"
    return (
        "no single module's older weights explain its answer: the server computes something else than transformers "
        "does, by its code for this family (`make matrix` compares them) or for an option: start it without "
        "--kv-cache-dtype and the like, or accept the difference with `server.probe_tolerance`, in nats"
    )


@torch.no_grad()
def trained_log_probabilities(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """(L - 1,) log-probability of each token of `prompt` after the first, by the trainer's own forward pass.

    On the CPU, wherever the model is.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    logits = model(ids[:, :-1], use_cache=False).logits[0].float()
    chosen: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].cpu()
    return chosen
