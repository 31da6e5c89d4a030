"""Token ids and loss mask: exactly the tokens that the model itself would have had to produce.

The prompt of a chat is what the server would send to the model: the chat template with the generation prompt.
What follows it, up to and including the end-of-turn token, is trained; nothing else is.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hogwild.errors import ExampleError


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised example of T tokens."""

    ids: list[int]
    """(T,) token ids."""
    trained: list[bool]
    """(T,) loss mask: trained[i] says that predicting ids[i] from ids[:i] is trained. trained[0] is False."""

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def eos_token_id(self) -> Any: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> Any: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def decode(self, token_ids: list[int]) -> Any: ...


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    *,
    only_last: bool,
) -> Encoded:
    """A conversation that ends with the assistant's turn, through the model's own chat template.

    Raises:
        ExampleError: there is no template, it fails, or it renders a trained turn differently from what the
            server would have seen (some templates drop the reasoning of earlier turns).
    """
    if not tokenizer.chat_template:
        raise ExampleError(
            'the model has no chat template; use "prompt" and "completion", or "text"', "messages"
        )

    def render(upto: int, *, generation_prompt: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages[:upto]],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (
            Exception
        ) as error:  # a template is a program that came with the model: it raises what it likes
            raise ExampleError(f"the chat template refuses it: {error}", "messages") from error
        return str(text)

    text = render(len(messages), generation_prompt=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for i in turns[-1:] if only_last else turns:
        prompt = render(i, generation_prompt=True)
        answered = render(i + 1, generation_prompt=False)
        if not (answered.startswith(prompt) and text.startswith(answered) and len(answered) > len(prompt)):
            raise ExampleError(
                "the chat template renders this turn differently once the conversation goes on"
                + ("" if only_last else '; use train_on "last" and one line per turn'),
                f"messages[{i}]",
            )
        spans.append((len(prompt), len(answered)))
    cuts = [cut for span in spans for cut in span if cut < len(text)]
    pieces = _tokenize(text, cuts, tokenizer, add_special_tokens=False)
    ids: list[int] = []
    trained: list[bool] = []
    for n, piece in enumerate(pieces):
        # Pieces alternate: context, trained, context, ...
        end = _end_of_turn(piece, tokenizer) if n % 2 else 0
        ids += piece
        trained += [i < end for i in range(len(piece))]
    return _masked(ids, trained)


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Encoded:
    """Plain concatenation: the prompt as the completions API tokenises it, then what should follow it."""
    context, answer = _tokenize(prompt + completion, [len(prompt)], tokenizer, add_special_tokens=True)
    answer = answer + _eos(tokenizer)
    return _masked(context + answer, [False] * len(context) + [True] * len(answer))


def encode_text(text: str, tokenizer: Tokenizer) -> Encoded:
    """Every token is trained but the first, which nothing predicts; the end-of-text token is appended."""
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"]) + _eos(tokenizer)
    return _masked(ids, [True] * len(ids))


def _masked(ids: list[int], trained: list[bool]) -> Encoded:
    """Nothing predicts the first token, and nothing needs what comes after the last trained one."""
    trained = [False, *trained[1:]]
    end = max((i + 1 for i, on in enumerate(trained) if on), default=len(ids))
    return Encoded(ids[:end], trained[:end])


def _eos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _tokenize(
    text: str, cuts: list[int], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> list[list[int]]:
    """Tokenises a text in pieces that end exactly at the given characters.

    The whole text is tokenised at once where its tokens break at every cut. Where one would span a cut
    (newlines on both sides, say), the pieces are tokenised apart, which is what serving does.
    """
    whole = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    pieces: list[list[int]] = []
    start = 0
    for cut in cuts:
        before = list(tokenizer(text[:cut], add_special_tokens=add_special_tokens)["input_ids"])
        if whole[: len(before)] != before:
            break
        pieces.append(whole[start : len(before)])
        start = len(before)
    else:
        return [*pieces, whole[start:]]
    bounds = [0, *cuts, len(text)]
    return [
        list(tokenizer(text[a:b], add_special_tokens=add_special_tokens and a == 0)["input_ids"])
        for a, b in itertools.pairwise(bounds)
    ]


def _end_of_turn(ids: list[int], tokenizer: Tokenizer) -> int:
    """Tokens of a turn that the model produces: up to its last special token, if only white space follows.

    Templates put a newline after the end-of-turn token for the next turn; generation has stopped by then.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        _eos(tokenizer)
    )
    last = max((i for i, token in enumerate(ids) if token in special), default=None)
    if last is None or str(tokenizer.decode(ids[last + 1 :])).strip():
        return len(ids)
    return last + 1
