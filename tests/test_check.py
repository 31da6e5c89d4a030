"""What `hogwild check` shows, as text, in colours and as records."""

import io
import json

import pytest
from rich.console import Console
from transformers import Gemma3nTextConfig
from typer.testing import CliRunner

from chat_families import tokenizer_of
from hogwild.check import Checker, freezes, tokenizer_in
from hogwild.cli import app
from hogwild.config import load
from hogwild.errors import UsageError
from tiny import SIZES, chat_tokenizer, tokenizer

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


def checked(files, *, color=False, config=None, tokenizer=None, **options):
    """Its records, and all that it printed."""
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=color, color_system="standard" if color else None)
    checker = Checker(load(overrides=config or {}), console, tokenizer, **options)
    records = list(checker.files(files))
    checker.sum_up()
    return records, out.getvalue()


def test_a_context_that_this_model_cannot_freeze_counts(tmp_path):
    """Layers of Gemma 3n and 4 share keys and values. The daemon trains all of a line then, and would refuse it."""
    training = load(overrides={"training.max_trained_tokens": 8}).training
    sizes = {**SIZES, "num_hidden_layers": 4, "head_dim": 8}
    for shared, expected in ((0, True), (2, False)):
        Gemma3nTextConfig(
            **sizes, laurel_rank=4, num_kv_shared_layers=shared, activation_sparsity_pattern=[0.0] * 4,
            vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, architectures=["Gemma3nForCausalLM"],
        ).save_pretrained(tmp_path / "model")  # fmt: skip
        assert freezes(tmp_path / "model", training) is expected
        assert freezes(tmp_path / "model", load().training), "nothing depends on it"
    (file := tmp_path / "a.jsonl").write_text('{"prompt": "w1 w2 w3 w4 w5 w6 w7 w8", "completion": " w9"}\n')
    tokenizer(tmp_path / "model")
    environment = {"HOGWILD_TRAINING__MAX_TRAINED_TOKENS": "8"}
    ran = CliRunner().invoke(app, ["check", str(file), "--model", str(tmp_path / "model")], env=environment)
    assert ran.exit_code == 1
    assert "tokens, all of them with gradients, and training.max_trained_tokens is 8" in ran.output


def test_every_line_is_ok_or_has_its_reason(file):
    records, text = checked([file])
    assert [record["ok"] for record in records] == [True, False, True]
    assert "ok  facts.jsonl:1" in text
    assert "err facts.jsonl:2 txt: unknown field; did you mean `text`?" in text
    assert "2 of 3 lines will be trained" in text
    assert (records[1]["field"], records[1]["line"]) == ("txt", 2)


def test_with_a_tokenizer_it_shows_what_is_trained_and_what_is_too_long(file):
    tokenizer = tokenizer_of("chatml")
    records, text = checked([file], tokenizer=tokenizer)
    prompt = [{"role": "user", "content": "[b]Who?"}]
    context = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("[/b] Ada.<|im_end|>")["input_ids"]
    assert (records[0]["tokens"], records[0]["trained_tokens"]) == (len(context + answer), len(answer))
    assert f"{len(answer)} of {len(context + answer)} tokens trained" in text
    assert "⟦[/b] Ada.<|im_end|>⟧" in text
    records, text = checked([file], tokenizer=tokenizer, config={"training.max_tokens": 5})
    assert [record["ok"] for record in records] == [False, False, True]  # a text is trained in windows
    assert "training.max_tokens is 5" in text
    records, text = checked(
        [file], tokenizer=tokenizer, config={"training.max_trained_tokens": len(answer) - 1}
    )
    assert [record["ok"] for record in records] == [False, False, True]
    assert f"{len(answer)} tokens from the first trained one on, and training.max_trained_tokens is" in text
    records, text = checked([file], tokenizer=tokenizer, context_length=11)
    assert "the model's context is 11" in text


def test_trained_tokens_are_bright_and_context_is_dim(file):
    _, text = checked([file], tokenizer=tokenizer_of("chatml"), color=True)
    bright, dim = "\x1b[1;92m", "\x1b[2m"
    assert f"{bright}[/b] Ada.<|im_end|>" in text
    assert f"{dim}[b]Who?<|im_end|>" in text
    assert "⟦" not in text


def test_every_token_can_be_seen_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Say it:", "completion": " Zo\\u00eb \\ud83d\\ude00\\n\\u001b[31mx"}\n')
    tokenizer = tokenizer_of("chatml")
    (record,), text = checked([path], tokenizer=tokenizer, tokens=True)
    (sequence,) = record["sequences"]
    assert tokenizer.decode(sequence["ids"]).startswith("Say it: Zoë")
    assert len(sequence["ids"]) == record["tokens"]
    assert sum(sequence["trained"]) == record["trained_tokens"]
    assert "Say| it|:⟦ Zo|ë| 😀⟨2⟩|↵" in text
    assert "↵" in text
    assert "\x1b" not in text, "nothing in a line can move the terminal's cursor"
    plain = text.split("⟦")[1].split("⟧")[0].replace("<|im_end|>", "END")
    grouped = sum(int(word.split("⟩")[0]) - 1 for word in plain.split("⟨")[1:])
    assert len(plain.split("|")) + grouped == record["trained_tokens"]


def test_warnings_stand_below_their_line_and_do_not_make_it_wrong(tmp_path):
    lines = [{"prompt": "Who?", "completion": "Ada."}, {"text": "x"}, {"text": "x", "tags": ["again"]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, text = checked([path], tokenizer=tokenizer_of("chatml"))
    assert [[one["code"] for one in record["warnings"]] for record in records] == [
        ["no-space"],
        [],
        ["duplicate"],
    ]
    assert "warning duplicate: the same as a.jsonl:2" in text
    assert "3 of 3 lines will be trained, 2 with a warning" in text
    _, text = checked([path], tokenizer=tokenizer_of("chatml"), problems_only=True)
    assert "a.jsonl:2 " not in text
    assert "a.jsonl:3 " in text


def test_what_a_line_says_for_itself_is_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = [
        {"role": r, "content": c}
        for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    lines = [
        {"id": "old-address", "text": "x", "weight": -0.5, "passes": 3, "priority": 2},
        {"messages": chat, "train_on": "all", "context": "full"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, text = checked([path], tokenizer=tokenizer_of("qwen3-thinking"))
    assert "old-address, 1 of 2 tokens trained, weight -0.5: unlearns, passes 3, priority 2" in text
    assert "2 sequences, because the chat template changes earlier turns, train_on all, context full" in text
    assert [record["id"] for record in records] == ["old-address", None]


def test_a_line_cannot_speak_to_the_terminal(tmp_path):
    """Names and fields are shown as what the text is: without what moves a cursor or sets colours."""
    path = tmp_path / "\x1b[41mfacts.jsonl"
    path.write_text('{"id": "\\u001b[2Ja", "text": "a"}\n{"\\u001b[31mred": 1, "text": "a"}\n')
    _, text = checked([path])
    assert "\x1b" not in text
    assert "ok  \\x1b[41mfacts.jsonl:1 \\x1b[2Ja\n" in text
    assert "\\x1b[31mred: unknown field" in text


def test_the_template_is_that_of_the_server_which_is_configured(tmp_path):
    """As the daemon would train it: `server.arguments` are those of the server."""
    chat_tokenizer(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w8"}]}\n'
    )
    template = "{% for message in messages %}{{ who }} {{ message['content'] }} {% endfor %}"
    arguments = ["--chat-template", template, "--default-chat-template-kwargs", '{"who": "w5"}']
    console = Console(record=True, width=200)
    config = load(overrides={"server": {"arguments": arguments}})
    (record,) = Checker.of(config, console, tmp_path / "model").files([tmp_path / "a.jsonl"])
    assert record["ok"]
    assert "w5 w9⟦w5 w8⟧" in console.export_text()


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.jsonl: cannot be read"):
        checked([tmp_path / "absent.jsonl"])


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: there is no such folder$"):
        tokenizer_in(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="no tokenizer there: ") as caught:
        tokenizer_in(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["NewKind", None])
def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path, kind):
    """Of a newer version, say; or half of it."""
    tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["type"] = kind
    path.write_text(json.dumps(content if kind else {}))
    with pytest.raises(UsageError, match="no tokenizer there: ") as caught:
        tokenizer_in(tmp_path)
    assert "\n" not in str(caught.value)
