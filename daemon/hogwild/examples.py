"""From one line of JSON to a typed example. Every refusal is an `ExampleError` with a reason and a field."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hogwild.encoding import Encoded, Tokenizer, encode_chat, encode_completion, encode_text
from hogwild.errors import ExampleError
from hogwild.fields import choice, filled, integer, kind, number, unknown
from hogwild.messages import Message, parse_messages, parse_tools
from hogwild.other_formats import recognised
from hogwild.settings import MAX_PASSES
from hogwild.strict_json import loads_object

__all__ = ["Context", "Encoded", "Example", "Tokenizer", "TrainOn", "encode", "parse_line"]

TrainOn = Literal["last", "all"]
Context = Literal["frozen", "full"]

COMMON = ("id", "tags", "weight", "priority", "passes", "until_loss")
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools", "train_on", "context", *COMMON),
    "prompt": ("prompt", "completion", "context", *COMMON),
    "text": ("text", *COMMON),
}
_FORM = 'needs "messages", or "prompt" and "completion", or "text"'
MAX_PRIORITY = 2**31
MAX_ID_CHARS = 256
MAX_TAGS = 16
MAX_TAG_CHARS = 64
# Unlearning is bounded twice: by this, and by `loss.bounded_loss`, which no factor can get past.
MIN_WEIGHT, MAX_WEIGHT = -1.0, 10.0


@dataclass(frozen=True, slots=True)
class Example:
    """One valid line. Exactly one of `messages`, `completion` and `text` is set."""

    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    id: str | None = None
    """The user's own name for it; shown in logs, not required to be unique."""
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    """Factor on the loss, MIN_WEIGHT to MAX_WEIGHT and not 0; negative unlearns."""
    priority: int = 0
    """Higher goes first among examples with as many passes behind them."""
    passes: int | None = None
    """None: as configured."""
    until_loss: float | None = None
    """Trained until its loss, in nats per trained token, is at most this, or its passes are used up."""
    train_on: TrainOn | None = None
    """None: as configured."""
    context: Context | None = None
    """Whether gradients reach the tokens before the trained ones. None: as configured."""


def parse_line(line: bytes) -> Example:
    """Reads one line of a spool file, without its newline.

    Raises:
        ExampleError: the line is not one of the three forms; names the field and what would be right.
    """
    known = {name for names in FORMS.values() for name in names}
    # null is "left out", as many exporters write every column; but a misspelt name is an error whatever it says.
    data = {
        name: value for name, value in loads_object(line).items() if value is not None or name not in known
    }
    if (other := recognised(data)) is not None:
        raise other
    forms = [form for form in FORMS if form in data]
    if len(forms) > 1:
        raise ExampleError(f"{' and '.join(forms)} in one line; choose one", forms[1])
    if not forms:
        for name in data:
            if name not in known:
                raise unknown(name, sorted(known), form=_FORM)
        raise ExampleError(_FORM)
    for name in data:
        if name not in FORMS[forms[0]]:
            raise unknown(name, FORMS[forms[0]])
    if forms[0] == "messages":
        content: dict[str, Any] = {"messages": parse_messages(data["messages"])}
        if "tools" in data:
            content["tools"] = tuple(parse_tools(data["tools"]))
        if "train_on" in data:
            content["train_on"] = choice(data["train_on"], "train_on", ("last", "all"), " (assistant turns)")
    elif forms[0] == "prompt":
        if "completion" not in data:
            raise ExampleError('missing; a "prompt" line needs what to answer', "completion")
        content = {name: filled(data[name], name) for name in ("prompt", "completion")}
    else:
        content = {"text": filled(data["text"], "text")}
    if "context" in data:
        content["context"] = choice(data["context"], "context", ("frozen", "full"))
    return Example(**content, **_common(data))


def encode(
    example: Example,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    max_trained: int | None = None,
    context: Context = "frozen",
    freezes: bool = True,
    context_length: int | None = None,
    train_on: TrainOn = "last",
    stops: Collection[str] = (),
) -> list[Encoded]:
    """Token ids and loss mask of an example.

    Args:
        tokenizer: the model's own, with its chat template.
        max_tokens: longest allowed, context included.
        max_trained: longest allowed from the first trained token on, or in all where context is not frozen.
        context: for lines that do not say.
        freezes: can the model's context be frozen at all?
        context_length: longest that the model takes, if that is known.
        train_on: for chats whose line does not say.
        stops: texts of the tokens at which the server ends an answer, from `encoding.stop_texts`.

    Returns:
        One sequence, or several where the chat template does not allow one (see `encode_chat`) or a text is long
        (see `encode_text`); they make up the example together, each trained token counting the same.

    Raises:
        ExampleError: too long, or the chat template or the tokenizer does not allow it.
    """
    try:
        if example.messages is not None:
            turns = example.train_on or train_on
            only_last = turns == "last"
            parts = encode_chat(example.messages, example.tools, tokenizer, only_last=only_last, stops=stops)
        elif example.completion is not None:
            parts = [encode_completion(example.prompt or "", example.completion, tokenizer)]
        else:
            longest = min(limit for limit in (max_tokens, max_trained, context_length) if limit is not None)
            parts = encode_text(example.text or "", tokenizer, longest)
    except (ExampleError, MemoryError):
        raise
    except Exception as error:  # a tokenizer raises what it likes; one line must not stop all others
        raise ExampleError(f"the tokenizer refuses it: {error!r:.200}") from error
    for part in parts:
        length = len(part.ids)
        if context_length is not None and length > context_length:
            raise ExampleError(f"{length} tokens, and the model's context is {context_length}")
        if length > max_tokens:
            raise ExampleError(f"{length} tokens, and training.max_tokens is {max_tokens}")
        if not any(part.trained):
            raise ExampleError("no token to train on")
        full = not freezes or (example.context or context) == "full"
        trained = length if full else length - part.trained.index(True)
        if max_trained is not None and trained > max_trained:
            which = "tokens, all of them with gradients" if full else "tokens from the first trained one on"
            raise ExampleError(f"{trained} {which}, and training.max_trained_tokens is {max_trained}")
    return parts


def _common(data: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "id" in data:
        value = data["id"]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ExampleError(f"must be a string, not {kind(value)}", "id")
        fields["id"] = str(value)
        if not 0 < len(fields["id"]) <= MAX_ID_CHARS:
            raise ExampleError(f"must have 1 to {MAX_ID_CHARS} characters", "id")
    if "tags" in data:
        tags = data["tags"]
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
            raise ExampleError('must be an array of strings, like ["support", "2025"]', "tags")
        if len(tags) > MAX_TAGS or any(len(tag) > MAX_TAG_CHARS for tag in tags):
            raise ExampleError(f"at most {MAX_TAGS}, of at most {MAX_TAG_CHARS} characters each", "tags")
        fields["tags"] = tuple(dict.fromkeys(tags))
    if "weight" in data:
        fields["weight"] = float(number(data["weight"], "weight"))
        if fields["weight"] == 0:
            raise ExampleError("0 trains nothing; leave the line out instead", "weight")
        if not MIN_WEIGHT <= fields["weight"] <= MAX_WEIGHT:
            raise ExampleError(
                f"must be between {MIN_WEIGHT:g} (unlearn) and {MAX_WEIGHT:g}; more passes do more", "weight"
            )
    if "priority" in data:
        fields["priority"] = integer(data["priority"], "priority", -MAX_PRIORITY, MAX_PRIORITY)
    if "passes" in data:
        fields["passes"] = integer(data["passes"], "passes", 1, MAX_PASSES)
    if "until_loss" in data:
        fields["until_loss"] = float(number(data["until_loss"], "until_loss"))
        if fields["until_loss"] <= 0:
            raise ExampleError("must be greater than 0 (nats per trained token)", "until_loss")
        if fields.get("weight", 1.0) < 0:
            raise ExampleError(
                "is for learning; with a negative weight, training.unlearn_until_loss says when it is enough",
                "until_loss",
            )
    return fields
