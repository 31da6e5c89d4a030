"""What may surprise in a line that can be trained: not wrong, but perhaps not what was meant.

`hogwild check` prints them for every line; the daemon logs each kind once a file.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hogwild import thoughts
from hogwild.chat import Chat
from hogwild.encoding import Tokenizer, special_tokens, strings_of
from hogwild.errors import ExampleError
from hogwild.examples import Example, TrainOn

_REMEMBERED = 10_000


class Caution(NamedTuple):
    code: str
    """ignored, special-token, rendered-chat, empty-thinking, repeats-prompt, no-space."""
    text: str


class Warned:
    """Which kinds of caution have been logged for which file, in bounded memory."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()

    def first(self, file: str, code: str) -> bool:
        new = (file, code) not in self._seen
        self._seen[file, code] = None
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return new


def cautions(example: Example, tokenizer: Tokenizer, train_on: TrainOn = "last") -> list[Caution]:
    """Everything doubtful about an example that `examples.encode` takes. Renders a chat a few times more."""
    if example.messages is not None:
        only_last = (example.train_on or train_on) == "last"
        return [*_of_chat(example, tokenizer, only_last), *_special_in_messages(example, tokenizer)]
    if example.completion is not None:
        return list(_of_completion(example.prompt or "", example.completion, tokenizer))
    found = _special_in(example.text or "", tokenizer)
    return [_rendered_chat("text", found)] if found else []


def _of_chat(example: Example, tokenizer: Tokenizer, only_last: bool) -> Iterator[Caution]:
    messages = example.messages or ()
    chat = Chat(messages, example.tools, tokenizer)
    trained = chat.trained(only_last)
    rendered = [chat.turn(i) for i in trained]

    def same(tools: bool, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> bool:
        """Does the template render the same without it?"""
        other = Chat([change(message) for message in messages], example.tools if tools else None, tokenizer)
        try:
            return [other.turn(i) for i in trained] == rendered
        except ExampleError:
            return False

    def without(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        return lambda message: {key: value for key, value in message.items() if key != name}

    if example.tools and same(False, dict):
        yield Caution("ignored", "the chat template ignores tools: the model will not see them")
    for name in ("name", "tool_calls"):
        if any(name in message for message in messages) and same(True, without(name)):
            yield Caution("ignored", f"the chat template ignores {name}")
    thinking = [messages[i] for i in trained if messages[i].get("reasoning_content")]
    if thinking and same(True, without("reasoning_content")):
        yield Caution("ignored", "the chat template ignores reasoning_content: it is not trained")
    for i, (prompt, _) in zip(trained, rendered, strict=True):
        thought = thoughts.at_end(prompt)
        if thought and not thought.is_open and thought.said_in(messages[i].get("content") or "")[0]:
            yield Caution(
                "ignored",
                f"messages[{i}]: the prompt ends the thought, so that in the content is not trained",
            )
            break
    for role in ("system", "developer", "tool"):
        first = next((message for message in messages if message["role"] == role), None)
        if first is not None and same(True, _changed(first)):
            yield Caution("ignored", f"the chat template leaves the {role} message out")
    for i, (_, answer) in zip(trained, rendered, strict=True):
        if thoughts.is_empty(answer) and not messages[i].get("reasoning_content"):
            yield Caution(
                "empty-thinking",
                f"messages[{i}] has no reasoning_content: the model learns to answer without thinking",
            )
            break


def _changed(which: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda message: {**message, "content": f"{message['content']} x"} if message is which else message


def _special_in_messages(example: Example, tokenizer: Tokenizer) -> Iterator[Caution]:
    for i, message in enumerate(example.messages or ()):
        found = [token for text in strings_of(message) for token in _special_in(text, tokenizer)]
        if found:
            tokens = ", ".join(dict.fromkeys(found))
            yield Caution(
                "special-token",
                f"messages[{i}] contains {tokens}: read as that token, as when serving; it can fake a turn",
            )


def _of_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Iterator[Caution]:
    if completion.startswith(prompt):
        yield Caution("repeats-prompt", "the completion begins with the prompt: give only what follows it")
    elif (
        not (prompt[-1].isspace() or completion[0].isspace())
        and completion[0].isalnum()
        and prompt[-1] not in "(['\""
    ):
        yield Caution(
            "no-space", f"no white space between prompt and completion: {prompt[-12:] + completion[:12]!r}"
        )
    if found := _special_in(prompt, tokenizer):
        yield Caution(
            "rendered-chat", f"prompt contains {', '.join(found)}: of a chat, messages trains what is served"
        )


def _rendered_chat(field: str, tokens: list[str]) -> Caution:
    return Caution(
        "rendered-chat",
        f"{field} contains {', '.join(tokens)}: if it is a chat, everybody's words are trained; use messages",
    )


def _special_in(text: str, tokenizer: Tokenizer) -> list[str]:
    return [token for token in dict.fromkeys(special_tokens(tokenizer).values()) if token in text]
