"""One sequence as coloured text: context dim, trained tokens bright; without colours, trained text in brackets."""

import itertools
from dataclasses import dataclass

from rich.text import Text

from hogwild.encoding import Encoded, Tokenizer
from hogwild.terminal import plain

SHOWN_CONTEXT_TOKENS = 64  # the end of a long context is what matters before the trained tokens
SHOWN_TRAINED_TOKENS = 256
CONTEXT, TRAINED = "dim", "bold bright_green"
# One token light, the next one dark.
CONTEXT_TOKENS = ("grey62 on grey11", "grey62 on grey23")
TRAINED_TOKENS = ("bold #b5f5b5 on #123a1c", "bold #b5f5b5 on #1f6b33")


@dataclass(frozen=True)
class Shown:
    tokens: bool
    """Every token, each set off from the next."""
    colours: bool


def show(encoded: Encoded, tokenizer: Tokenizer, shown: Shown) -> Text:
    text = Text()
    pairs = zip(encoded.trained, encoded.ids, strict=True)
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        if not shown.colours and trained:
            text.append("⟦")
        if shown.tokens:
            _append_tokens(text, ids, tokenizer, trained, shown.colours)
        else:
            _append_text(text, ids, tokenizer, trained)
        if not shown.colours and trained:
            text.append("⟧")
    return text


def _append_text(text: Text, ids: list[int], tokenizer: Tokenizer, trained: bool) -> None:
    limit = SHOWN_TRAINED_TOKENS if trained else SHOWN_CONTEXT_TOKENS
    style = TRAINED if trained else CONTEXT
    if len(ids) > limit and trained:
        half = limit // 2
        text.append(plain(tokenizer.decode(ids[:half])), style)
        text.append(f" ... {len(ids) - 2 * half} tokens ... ", CONTEXT)
        ids = ids[-half:]
    elif len(ids) > limit:
        text.append("... ", CONTEXT)
        ids = ids[-limit:]
    text.append(plain(tokenizer.decode(ids)), style)


def _append_tokens(text: Text, ids: list[int], tokenizer: Tokenizer, trained: bool, colours: bool) -> None:
    styles = itertools.cycle(TRAINED_TOKENS if trained else CONTEXT_TOKENS)
    for n, (word, style) in enumerate(zip(_words(ids, tokenizer), styles, strict=False)):
        if n and not colours:
            text.append("|")
        line, *more = word.split("\n")
        text.append(line + "↵" * len(more), style if colours else "")
        if more:
            text.append("\n")


def _words(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Each token's text; tokens that are parts of one character come as one, with their number."""
    words: list[str] = []
    held: list[int] = []
    for token in ids:
        held.append(token)
        word = plain(tokenizer.decode(held))
        if "\ufffd" in word and len(held) < 4:
            continue
        words.append(word if len(held) == 1 else f"{word}⟨{len(held)}⟩")
        held = []
    if held:
        words.append(plain(tokenizer.decode(held)))
    return words
