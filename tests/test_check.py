import io

import pytest
from rich.console import Console

from hogwild.check import check
from hogwild.config import load
from hogwild.errors import UsageError

LINES = (
    '{"messages": [{"role": "user", "content": "[b]Who?"}, {"role": "assistant", "content": "[/b] Ada."}]}\n'
    '{"txt": "a"}\n'
    '{"text": "one two three four five six seven eight nine ten"}\n'
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(LINES)
    return path


def checked(files, **options) -> tuple[list[dict[str, object]], str]:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=options.pop("color", False))
    return check(files, load(overrides=options.pop("config", {})), console, **options), out.getvalue()


def test_every_line_is_ok_or_has_its_reason(file):
    records, text = checked([file])
    assert [record["ok"] for record in records] == [True, False, True]
    assert "ok  facts.jsonl:1" in text
    assert "err facts.jsonl:2 txt: unknown field; did you mean `text`?" in text
    assert "2 of 3 lines will be trained" in text


def test_with_a_tokenizer_it_shows_what_is_trained_and_what_is_too_long(file, demo_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    records, text = checked([file], tokenizer=tokenizer)
    prompt = [{"role": "user", "content": "[b]Who?"}]
    context = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("[/b] Ada.<|im_end|>")["input_ids"]
    assert (records[0]["tokens"], records[0]["trained_tokens"]) == (len(context + answer), len(answer))
    assert f"{len(answer)} of {len(context + answer)} tokens trained" in text
    assert "[/b] Ada.<|im_end|>" in text
    records, text = checked([file], tokenizer=tokenizer, config={"training.max_tokens": 5})
    assert [record["ok"] for record in records] == [False, False, False]
    assert "training.max_tokens is 5" in text


def test_trained_tokens_are_bright_and_context_is_dim(file, demo_model_dir):
    from transformers import AutoTokenizer

    _, text = checked([file], tokenizer=AutoTokenizer.from_pretrained(demo_model_dir), color=True)
    bright, dim = "\x1b[1;92m", "\x1b[2m"
    assert f"{bright}[/b] Ada.<|im_end|>" in text
    assert f"{dim}[b]Who?<|im_end|>" in text


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.jsonl: cannot be read"):
        checked([tmp_path / "absent.jsonl"])
