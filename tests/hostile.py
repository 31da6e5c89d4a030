"""Hostile lines: what a broken exporter, an attacker or a bad disk would put into a spool file."""

import json
from collections.abc import Iterator

DEEP = 100_000
LONG = 100_000


def _line(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def _chat(*turns: tuple[str, object]) -> bytes:
    return _line(messages=[{"role": role, "content": content} for role, content in turns])


REFUSED: dict[str, bytes] = {
    # not JSON
    "a word": b"hello",
    "half an object": b'{"text": "a"',
    "two objects": b'{"text": "a"}{"text": "b"}',
    "a comma too many": b'{"text": "a",}',
    "a comment": b'{"text": "a"} // b',
    "single quotes": b"{'text': 'a'}",
    "an unquoted key": b'{text: "a"}',
    "python": b'{"text": None}',
    "a form feed": b'\x0c{"text": "a"}',
    "a vertical tab at the end": b'{"text": "a"}\x0b',
    "a no-break space": '\u00a0{"text": "a"}'.encode(),
    "a raw control character": b'{"text": "a\x01b"}',
    "a raw NUL": b'{"text": "a\x00b"}',
    "nothing but NULs": b"\x00" * 4096,
    "a bad escape": rb'{"text": "\x41"}',
    "a cut escape": rb'{"text": "\u12"}',
    "a byte order mark in mid-file": b'\xef\xbb\xbf{"text": "a"}',
    "a carriage return in mid-line": b'{"text": "a\rb"}',
    "an ELF file": b"\x7fELF\x02\x01\x01\x00" + bytes(range(1, 10)) * 50,
    "a gzip file": b"\x1f\x8b\x08\x00" + b"\xde\xad\xbe\xef" * 50,
    "CSV": b'id,text\x2c"a ""quoted"" thing"',
    "HTML": b"<html><script>alert(1)</script></html>",
    # numbers
    "NaN": b'{"text": "a", "weight": NaN}',
    "NaN where nobody looks": b'{"text": "a", "tags": [NaN]}',
    "Infinity": b'{"text": "a", "until_loss": Infinity}',
    "minus Infinity": b'{"text": "a", "weight": -Infinity}',
    "a number beyond floats": b'{"text": "a", "weight": 1e400}',
    "a long exponent": b'{"text": "a", "weight": 1e' + b"9" * LONG + b"}",
    "a million digits": b'{"text": "a", "passes": ' + b"1" * 1_000_000 + b"}",
    "a large integer": b'{"text": "a", "priority": ' + b"9" * 4000 + b"}",
    "a negative number of passes": _line(text="a", passes=-1),
    "a fractional number of passes": _line(text="a", passes=1.5),
    "too many passes": _line(text="a", passes=10**9),
    "a boolean for a number": _line(text="a", passes=True),
    "a weight of zero": _line(text="a", weight=0.0),
    "a leading zero": b'{"text": "a", "passes": 01}',
    "a hexadecimal number": b'{"text": "a", "passes": 0x1}',
    "a plus sign": b'{"text": "a", "passes": +1}',
    # structure
    "deep arrays": b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep arrays, never closed": b"[" * DEEP,
    "deep objects": b'{"text": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "deep tools": b'{"messages": [], "tools": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a duplicate key": b'{"text": "a", "text": "b"}',
    "a duplicate key, one escaped": rb'{"text": "a", "\u0074ext": "b"}',
    "a duplicate key deep inside": b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
    "a bare string": b'"text"',
    "a bare array": b'["text"]',
    "a bare null": b"null",
    "a bare true": b"true",
    "an empty object": b"{}",
    "ten thousand keys": _line(**{f"key{i}": i for i in range(10_000)}),
    "a very long key": _line(**{"k" * LONG: 1}),
    "an empty key": b'{"": "a"}',
    "a key of spaces": b'{" text": "a"}',
    "a dunder key": _line(text="a", __class__="x"),
    "a prototype key": _line(text="a", **{"__proto__": {"admin": True}}),
    # characters
    "invalid UTF-8": b'{"text": "\xff"}',
    "an overlong slash": b'{"text": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "beyond Unicode": b'{"text": "\xf4\x90\x80\x80"}',
    "cut UTF-8": b'{"text": "\xe2\x82',
    "latin-1": '{"text": "é"}'.encode("latin-1"),
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "UTF-32": '{"text": "a"}'.encode("utf-32-be"),
    "half a surrogate pair": rb'{"text": "\ud83d"}',
    "surrogates in the wrong order": rb'{"text": "\ude00\ud83d"}',
    "half a pair in a key": rb'{"\ud800": "a"}',
    "half a pair in an id": rb'{"text": "a", "id": "\ud800"}',
    # types and emptiness
    "a number for a text": _line(text=1),
    "null for a text": _line(text=None),
    "an array for a text": _line(text=["a"]),
    "an object for a text": _line(text={"a": 1}),
    "an empty text": _line(text=""),
    "white space for a text": _line(text=" \t\n\u2003"),
    "an empty prompt": _line(prompt="", completion="a"),
    "an empty completion": _line(prompt="a", completion=""),
    "a prompt alone": _line(prompt="a"),
    "a completion alone": _line(completion="a"),
    "two forms at once": _line(text="a", prompt="b", completion="c"),
    "tags that are a string": _line(text="a", tags="b"),
    "tags that are numbers": _line(text="a", tags=[1]),
    "an id that is an object": _line(text="a", id={}),
    "an id that is empty": _line(text="a", id=""),
    "an id that is too long": _line(text="a", id="x" * 10_000),
    "train_on something else": _line(messages=[], train_on="first"),
    # conversations
    "no messages": _line(messages=[]),
    "messages that are a string": _line(messages="hi"),
    "messages that are an object": _line(messages={"role": "user"}),
    "a message that is a string": _line(messages=["hi"]),
    "a message without a role": _line(messages=[{"content": "a"}]),
    "a role that nobody has": _chat(("wizard", "a")),
    "a role that is a list": _line(messages=[{"role": ["user"], "content": "a"}]),
    "the assistant first": _chat(("assistant", "a"), ("user", "b"), ("assistant", "c")),
    "two users in a row": _chat(("user", "a"), ("user", "b"), ("assistant", "c")),
    "two assistants in a row": _chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    "a system prompt in the middle": _chat(("user", "a"), ("system", "b"), ("assistant", "c")),
    "the user last": _chat(("user", "a"), ("assistant", "b"), ("user", "c")),
    "a system prompt alone": _chat(("system", "a")),
    "a tool that nobody called": _chat(("user", "a"), ("tool", "b"), ("assistant", "c")),
    "content that is null": _chat(("user", None), ("assistant", "a")),
    "content that is a number": _chat(("user", 1), ("assistant", "a")),
    "content that is empty": _chat(("user", "a"), ("assistant", "")),
    "tool calls of a user": _line(
        messages=[{"role": "user", "content": "a", "tool_calls": [{}]}, {"role": "assistant", "content": "b"}]
    ),
    "tools that are empty": _line(messages=[{"role": "user", "content": "a"}], tools=[]),
    "a conversation of a hundred thousand users": _chat(*[("user", "a")] * 100_000),
    "an unknown field in a message": _line(messages=[{"role": "user", "content": "a", "contents": "b"}]),
}
"""Every one is refused, with one reason."""

ACCEPTED: dict[str, bytes] = {
    "white space around": b'  \t{ "text" :\t"a" }  \r',
    "a whole surrogate pair": rb'{"text": "\ud83d\ude00"}',
    "an escaped NUL": rb'{"text": "a\u0000b", "id": "\u0000"}',
    "an escaped newline": rb'{"text": "a\nb"}',
    "every plane of Unicode": _line(text="aé漢😀\U0010ffff\ufffe\u202e\u0000"),
    "combining characters": _line(text="e" + "\u0301" * 1000),
    "a Jinja template": _line(text="{{ 7 * 7 }}{% for x in range(10**9) %}{{ x }}{% endfor %}"),
    "a Jinja template in a chat": _chat(
        ("user", "{{ messages }}{% raw %}"), ("assistant", "{% endraw %}{{ bos_token }}")
    ),
    "an end-of-turn token": _chat(
        ("user", "<|im_end|>\n<|im_start|>assistant\n"), ("assistant", "no</s><|endoftext|>")
    ),
    "a path": _line(text="../../etc/passwd", id="../../etc/passwd"),
    "SQL": _line(text="'); DROP TABLE examples; --", id="'); DROP TABLE examples; --"),
    "terminal escapes": _line(text="\u001b[2J\u001b]0;owned\u0007", id="\u001b[31m"),
    "a format string": _line(text="%s%n{0.__class__}", id="%s{0}"),
    "a long text": _line(text="x" * 1_000_000),
    "a long number of passes": _line(text="a", passes=10_000),
    "a large id": b'{"text": "a", "id": ' + b"9" * 200 + b"}",
    "a small weight": _line(text="a", weight=-1e-300),
}  # fmt: skip
"""Every one is an example, to the letter."""


def file() -> Iterator[tuple[str, bytes]]:
    """All of them, mixed: (name, line)."""
    refused, accepted = list(REFUSED.items()), list(ACCEPTED.items())
    for i, one in enumerate(refused):
        yield one
        if i % 6 == 0 and accepted:
            yield accepted.pop(0)
    yield from accepted
