"""Token ids and loss mask: exactly the tokens that the model itself would have had to produce.

The prompt of a chat is what the server would send to the model: the chat template with the generation prompt.
What follows it, up to and including the end-of-turn token, is trained; nothing else is.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hogwild import thoughts
from hogwild.chat import Chat
from hogwild.errors import ExampleError

MAX_WINDOWS = 8
"""Sequences that a long text is split into, at most: they are trained in one step."""
_MARKS = ("\n", ":", "a")
"""What a text is put behind to see its tokens where it does not begin; one of them grows together with none of it."""
_TAIL = 8
"""Tokens of what comes before a text that are decoded with it: more than one character is made of."""


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
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> Any: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def decode(self, token_ids: list[int]) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Part:
    """One text, and the turns of it that are trained: (message, start, end) in characters, in order."""

    text: str
    turns: list[tuple[int, int, int]]


def prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """The token ids of what a server sends to the model for an answer to these messages.

    Raises:
        ExampleError: the chat template takes no such chat, or there is none.
    """
    answered = [*messages, {"role": "assistant", "content": "."}]
    text = Chat(answered, None, tokenizer).prompt(len(messages))
    return _tokens(text, tokenizer, add_special_tokens=False)


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Tokenizer,
    *,
    only_last: bool,
    stops: Collection[str] = (),
) -> list[Encoded]:
    """A conversation that ends with the assistant's turn, through the model's own chat template.

    Args:
        stops: texts of the tokens at which the server ends an answer, from `stop_texts`.

    Returns:
        One sequence wherever one can hold all trained turns, each after the context that it is served with. A
        template that renders an earlier turn differently once the conversation goes on (it drops the reasoning,
        or moves the tools) gives several, in order; every trained turn is in exactly one of them.

    Raises:
        ExampleError: there is no template, it fails, or what a turn has to answer cannot be told or learned.
    """
    chat = Chat(messages, tools, tokenizer)
    result: list[Encoded] = []
    if not (trained := chat.trained(only_last)):
        raise ExampleError(
            'the last turn has weight 0, and train_on is "last": nothing is trained', "messages"
        )
    for part in _parts(chat, trained, tokenizer, stops):
        result += _encode_part(part, messages, tokenizer)
    return result


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Encoded:
    """Plain concatenation: the prompt as the completions API tokenises it, then what should follow it.

    Raises:
        ExampleError: the completion goes on after the end-of-text token, where no answer does.
    """
    text = prompt + completion
    whole = _pieces(text, [len(prompt)], tokenizer, add_special_tokens=True)
    context, answer = whole or _apart(text, [len(prompt)], tokenizer, add_special_tokens=True)
    if not answer:
        raise ExampleError("is no token of its own", "completion")
    answer = _ended(answer, tokenizer)
    end = tokenizer.eos_token_id
    if end is not None and end in answer[:-1]:
        raise ExampleError(
            f"goes on after {tokenizer.decode([end])}, the model's end-of-text token, which is added by itself",
            "completion",
        )
    return _masked(context + answer, [False] * len(context) + [True] * len(answer))


def encode_text(text: str, tokenizer: Tokenizer, max_tokens: int) -> list[Encoded]:
    """Every token is trained but the first, which nothing predicts; the end-of-text token is appended.

    Returns:
        One sequence or, of a text that is longer than `max_tokens`, windows that overlap by a quarter: what a window
        shares with the one before is its context, so that each token is trained once, with something before it. A
        text is the same wherever it is read from; a chat or a completion is not, and is never split this way. More
        than MAX_WINDOWS are not made: the caller finds the one sequence too long.
    """
    ids = _ended(_tokens(text, tokenizer, add_special_tokens=True), tokenizer)
    start = _start(ids, tokenizer)
    shared = max_tokens // 4
    fresh = max_tokens - shared - len(start)  # tokens of each window but the first that are trained
    if len(ids) <= max_tokens or len(ids) > max_tokens + (MAX_WINDOWS - 1) * fresh or not shared:
        return [_masked(ids, [True] * len(ids))]
    windows = [_masked(ids[:max_tokens], [True] * max_tokens)]
    for at in range(max_tokens, len(ids), fresh):
        context, new = [*start, *ids[at - shared : at]], ids[at : at + fresh]
        windows.append(_masked(context + new, [False] * len(context) + [True] * len(new)))
    return windows


def context_length(folder: Path) -> int | None:
    """Tokens of the longest text that the model in `folder` takes; None if its configuration does not say."""
    from transformers import AutoConfig  # not to be paid for by who reads lines without a model

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return None
    # Of a model that also sees images, the part about text; by whatever name a family has for it (GPT-2: n_positions).
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def stop_texts(folder: Path, tokenizer: Tokenizer) -> frozenset[str]:
    """The tokens at which a server ends an answer of the model in `folder`, as they are written: those of its
    generation_config.json, or without one of its config.json, and the tokenizer's own."""
    from transformers import AutoConfig, GenerationConfig  # see `context_length`

    ids = {tokenizer.eos_token_id}
    for kind in (GenerationConfig, AutoConfig):
        try:
            said = getattr(kind.from_pretrained(folder, local_files_only=True), "eos_token_id", None)
        except (OSError, ValueError):
            continue
        ids.update(said if isinstance(said, list) else [said])
        break
    # Only what is added to a vocabulary is always read as that token, wherever its text stands.
    added = tokenizer.added_tokens_decoder
    return frozenset(str(token.content) for i, token in added.items() if int(i) in ids)


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens that stand for no text of their own: id -> how they are written."""
    found = {
        int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    if tokenizer.eos_token_id is not None:
        end = int(tokenizer.eos_token_id)
        found.setdefault(end, str(tokenizer.decode([end])))
    return found


def _parts(chat: Chat, trained: list[int], tokenizer: Tokenizer, stops: Collection[str]) -> list[_Part]:
    """As few texts as hold every trained turn behind its own prompt, found from the last turn back."""
    parts: list[_Part] = []
    for i in reversed(trained):
        prompt, answer = chat.turn(i)
        for stop in stops:
            _refuse_end(chat.messages[i], stop, f"messages[{i}]")
        answer = _up_to_stop(answer, stops) or _with_stop(answer, chat, i, tokenizer, stops)
        turn = (i, len(prompt), len(prompt) + len(answer))
        if parts and parts[-1].text.startswith(prompt + answer):
            parts[-1].turns.insert(0, turn)
        else:
            parts.append(_Part(prompt + answer, [turn]))
    return parts[::-1]


def _up_to_stop(text: str, stops: Collection[str]) -> str | None:
    """What the server lets the model say of `text`: nothing after a stop. Some templates write more: Phi-3's the
    end-of-text token behind the last turn, others the next generation prompt. None: there is no stop in it."""
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else None


def _with_stop(answer: str, chat: Chat, i: int, tokenizer: Tokenizer, stops: Collection[str]) -> str:
    """An answer that has no stop, with that of the next turn, if that is how the template ends it (GLM): or the model
    would not learn to stop."""
    if not stops or answer.rstrip().endswith(tuple(special_tokens(tokenizer).values())):
        return answer  # of a model that is served with other stops than its template's
    after = chat.goes_on(i)
    stop = next((stop for stop in stops if after.lstrip().startswith(stop)), None)
    return answer if stop is None else answer + after[: after.index(stop) + len(stop)]


def _encode_part(
    part: _Part, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> Iterator[Encoded]:
    cuts = [cut for _, start, end in part.turns for cut in (start, end) if cut < len(part.text)]
    pieces = _pieces(part.text, cuts, tokenizer, add_special_tokens=False)
    if pieces is None and len(part.turns) > 1:
        # A token spans a boundary. The server tokenises a later prompt as a whole, so each turn gets its own.
        for turn in part.turns:
            yield from _encode_part(_Part(part.text[: turn[2]], [turn]), messages, tokenizer)
        return
    pieces = pieces or _apart(part.text, cuts, tokenizer, add_special_tokens=False)
    ids: list[int] = []
    trained: list[bool] = []
    for n, piece in enumerate(pieces):
        # Pieces alternate: context, trained, context, ...
        i = part.turns[n // 2][0] if n % 2 else None
        end = 0 if i is None else _end_of_turn(piece, messages[i], f"messages[{i}]", tokenizer)
        ids += piece
        trained += [at < end for at in range(len(piece))]
    yield _masked(ids, trained)


def _masked(ids: list[int], trained: list[bool]) -> Encoded:
    """Nothing predicts the first token, and nothing needs what comes after the last trained one."""
    trained = [False, *trained[1:]]
    end = max((i + 1 for i, on in enumerate(trained) if on), default=len(ids))
    return Encoded(ids[:end], trained[:end])


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """With the end-of-text token, if the model has one and it is not there already."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]


def _start(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """What a text begins with before its first word: some models cannot read without it. GLM-4 has two tokens, and no
    one start token."""
    special, added = special_tokens(tokenizer), _tokens("", tokenizer, add_special_tokens=True)
    both = zip(ids, added, strict=False)
    start = [token for token, _ in itertools.takewhile(lambda two: two[0] == two[1] in special, both)]
    return start or (ids[:1] if ids[:1] == [tokenizer.bos_token_id] else [])


def _tokens(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _pieces(
    text: str, cuts: list[int], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> list[list[int]] | None:
    """The tokens of a whole text, split at the given characters; None if a token spans one of them."""
    whole = _tokens(text, tokenizer, add_special_tokens=add_special_tokens)
    pieces: list[list[int]] = []
    start = 0
    for cut in cuts:
        before = _tokens(text[:cut], tokenizer, add_special_tokens=add_special_tokens)
        if whole[: len(before)] != before:
            return None
        pieces.append(whole[start : len(before)])
        start = len(before)
    return [*pieces, whole[start:]]


def _apart(text: str, cuts: list[int], tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[list[int]]:
    """The pieces of a text tokenised one by one, which is what serving does: the prompt first, then the answer."""
    first, *others = itertools.pairwise([0, *cuts, len(text)])
    pieces = [_tokens(text[slice(*first)], tokenizer, add_special_tokens=add_special_tokens)]
    for place in others:
        pieces.append(_going_on(text[slice(*place)], [t for piece in pieces for t in piece], tokenizer))
    return pieces


def _going_on(text: str, before: list[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text that goes on from others. Some tokenizers begin every text with a space (Llama 2, Mistral,
    Phi-3): "serv" and "es" would be learned as "serv es"."""
    tail = before[-_TAIL:]

    def says(ids: list[int]) -> bool:
        return str(tokenizer.decode(tail + ids)) == str(tokenizer.decode(tail)) + text

    alone = _tokens(text, tokenizer, add_special_tokens=False)
    if says(alone):
        return alone
    for mark in _MARKS:
        marked = _tokens(mark + text, tokenizer, add_special_tokens=False)
        start = _tokens(mark, tokenizer, add_special_tokens=False)
        if marked[: len(start)] == start and says(marked[len(start) :]):
            return marked[len(start) :]
    return alone


def _end_of_turn(ids: list[int], message: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> int:
    """Tokens of a turn that the model produces: up to its last special token, if only white space follows.

    Templates put a newline after the end-of-turn token for the next turn; generation has stopped by then.

    Raises:
        ExampleError: the end is all there is, or the message itself writes the end-of-turn token: an answer would
            end there, and what comes after it could be a turn that somebody made up.
    """
    special = special_tokens(tokenizer)
    last = max((i for i, token in enumerate(ids) if token in special), default=None)
    if last is None or str(tokenizer.decode(ids[last + 1 :])).strip():
        return len(ids)
    said = str(tokenizer.decode(ids[:last]))
    if not (thoughts.after(said) if message.get("tool_calls") else said).strip():
        raise ExampleError(
            "nothing of this turn is left to train: the chat template leaves its "
            + ("tool_calls out" if message.get("tool_calls") else "content out"),
            where,
        )
    _refuse_end(message, special[ids[last]], where)
    return last + 1


def _refuse_end(message: Mapping[str, Any], end: str, where: str) -> None:
    """Raises ExampleError if a message itself writes what ends it."""
    if any(end in text for text in strings_of(message)):
        raise ExampleError(
            f"contains {end}, the model's end-of-turn token: its answer would end there", where
        )


def strings_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        for inner in value.values():
            yield from strings_of(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings_of(inner)
