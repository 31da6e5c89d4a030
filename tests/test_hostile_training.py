"""What a hostile line can do once it is accepted: be trained as the text that it is, and nothing else."""

import json
import stat
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hogwild import probes
from hogwild.config import load
from hogwild.errors import ConfigError, ExampleError
from hogwild.examples import encode, parse_line
from hogwild.files import replace_file
from hogwild.ledger import BadLine, Ledger
from hogwild.settings import SpoolConfig
from hogwild.spool import Spool

JINJA = [
    "{{ 7 * 7 }}", "{% for x in range(10**9) %}x{% endfor %}", "{{ messages }}", "{{ cycler.__init__.__globals__ }}",
    "{# gone #}", "{% raw %}{{ bos_token }}{% endraw %}", "{{ raise_exception('x') }}", "{%- set x = 1 -%}",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir):
    return AutoTokenizer.from_pretrained(demo_model_dir)


def encoded(line: dict, tokenizer) -> str:
    parts = encode(parse_line(json.dumps(line).encode()), tokenizer, max_tokens=4096)
    return tokenizer.decode(parts[-1].ids)


@pytest.mark.parametrize("text", JINJA)
def test_a_template_in_a_line_is_text_and_not_a_template(tokenizer, text):
    """In every place of a chat that reaches the model's own template, and in the other two forms."""
    chat = {"messages": [{"role": "system", "content": text}, {"role": "user", "content": text},
                         {"role": "assistant", "content": text}]}  # fmt: skip
    assert encoded(chat, tokenizer).count(text) == 3
    assert text in encoded({"prompt": text, "completion": text}, tokenizer)
    assert text in encoded({"text": text}, tokenizer)


_opened: list[str] = []
_listening = False


def _audit(event: str, arguments: tuple) -> None:
    if _listening and event in (
        "open",
        "os.listdir",
        "os.scandir",
        "socket.connect",
        "subprocess.Popen",
        "os.system",
    ):
        _opened.append(f"{event} {arguments[0] if event != 'socket.connect' else arguments[1]}")


sys.addaudithook(_audit)


@pytest.mark.parametrize(
    "form", ["{}", "file://{}", "../../../..{}", "~{}", "@{}", "!include {}", "<img src={}>"]
)
def test_no_path_from_a_line_is_opened(tokenizer, tmp_path, form):
    """Nor any address, by reading, accepting, encoding, or reporting it."""
    global _listening
    secret = tmp_path / "secret-5f1b"
    secret.write_text("a secret")
    text = form.format(secret)
    lines = [
        {"text": text, "id": text[:200], "tags": [text[:60]]},
        {"prompt": text, "completion": text},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]},
                      {"role": "assistant", "content": "a"}]},
        {"text": "a", text: "b"}, {"text": "a", "file": text}, {"$ref": text}, {"messages": text},
    ]  # fmt: skip
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(SpoolConfig(dir=tmp_path / "spool", settle_s=0), ledger, passes=1)
        spool.prepare()
        (spool.incoming / "a.jsonl").write_bytes(
            b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        )
        _opened.clear()
        _listening = True
        try:
            assert spool.scan_once().accepted == ["a.jsonl"]
            taken = ledger.pending(9)
            for pending in taken:
                encode(pending.example(), tokenizer, max_tokens=4096)
        finally:
            _listening = False
    assert len(taken) >= 3
    assert _opened, "the listener hears"
    assert not [
        what
        for what in _opened
        if "secret-5f1b" in what or what.startswith(("socket", "subprocess", "os.sys"))
    ]


def test_a_line_that_is_far_too_long_is_one_reason(tokenizer):
    with pytest.raises(ExampleError, match=r"\d+ tokens, and training.max_tokens is 2048"):
        encode(
            parse_line(json.dumps({"prompt": "word " * 20_000, "completion": "b"}).encode()),
            tokenizer,
            max_tokens=2048,
        )


def test_what_holds_dropped_lines_is_for_owner_and_group_alone(tmp_path):
    """Whatever the umask is. (The socket: tests/test_arena.py. Checkpoints are to be read by the server's user.)"""
    from hogwild.spool_files import write_errors_file

    with Ledger(tmp_path / "state" / "ledger.sqlite") as ledger:
        ledger.accept_file("a", "a", [BadLine(1, 0, None, "bad", "{}")], passes=1)
        write_errors_file(ledger, "a", "a", tmp_path / "a.errors.jsonl")
        replace_file(tmp_path / "probes.json", b"{}")
        paths = [*(tmp_path / "state").iterdir(), tmp_path / "a.errors.jsonl", tmp_path / "probes.json"]
        assert len(paths) >= 5, "the ledger, its log, its lock"
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) & 0o137 == 0, path


def test_a_probe_file_names_every_line_that_is_none(tokenizer, tmp_path):
    path = tmp_path / "probes.jsonl"
    path.write_text(
        '{"prompt": "The capital of France is", "completion": " Paris", "id": "france"}\n\n'
        '{"text": "Water is wet."}\n'
    )

    def encoder(example):
        return encode(example, tokenizer, max_tokens=64)

    found = probes.read(path, encoder)
    assert [probe.name for probe in found] == ["france", "line 3"]
    assert tokenizer.decode(found[0].ids[found[0].start :]).startswith(" Paris")
    path.write_text('{"text": "a b", "weight": 2}\n{"txt": "a"}\nx\n')
    with pytest.raises(ConfigError) as caught:
        probes.read(path, encoder)
    for part in ("3 wrong", "line 1: weight: means nothing for a probe", "line 2: txt: ", "line 3: "):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"probes\.file"):
        probes.read(tmp_path / "missing", encoder)


def test_of_a_chat_only_what_the_assistant_says_is_a_probe(tmp_path, tokenizer):
    """With every turn of it, and of a text that is longer than one window all of it."""
    turns = [("user", "Who?"), ("assistant", "Ada."), ("user", "When was that?"), ("assistant", "1843.")]
    line = {"messages": [{"role": role, "content": text} for role, text in turns], "train_on": "all"}
    path = tmp_path / "probes.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps({"text": "one two three " * 40}))
    *chat, first, second = probes.read(path, lambda example: encode(example, tokenizer, max_tokens=80))
    assert [tokenizer.decode(one.ids[one.start :]) for one in chat] == ["Ada.<|im_end|>", "1843.<|im_end|>"]
    assert first.start == 1
    words = tokenizer("one two three " * 40)["input_ids"]
    assert [*first.ids, *second.ids[second.start :]][: len(words)] == words


def test_the_shipped_probes_are_probes(tokenizer):
    shipped = Path(__file__).parents[1] / "config" / "probes.jsonl"
    found = probes.read(shipped, lambda example: encode(example, tokenizer, max_tokens=256))
    assert len(found) >= 12
    assert all(0 < probe.start < len(probe.ids) for probe in found)
    assert load(None, {"probes.file": str(shipped)}).probes.file == shipped
