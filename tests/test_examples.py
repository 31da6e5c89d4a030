import copy
import json
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer

from chat_families import tokenizer_of
from hogwild.encoding import context_length, encode_chat, stop_texts
from hogwild.errors import ExampleError
from hogwild.examples import COMMON, Example, encode, parse_line
from tiny import tokenizer as word_tokenizer

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]


def line(**fields) -> bytes:
    return json.dumps(fields).encode()


def reason(raw: bytes) -> ExampleError:
    with pytest.raises(ExampleError) as caught:
        parse_line(raw)
    return caught.value


# --- the line ---


def test_the_three_forms_with_everything_optional():
    common = {
        "id": "a-1",
        "tags": ["x", "y"],
        "weight": -0.5,
        "priority": -2,
        "passes": 3,
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chat = parse_line(line(messages=CHAT, tools=tools, train_on="all", context="full", **common))
    assert chat.messages == tuple(CHAT)
    assert chat.tools == tuple(tools)
    assert (chat.train_on, chat.id, chat.tags, chat.weight) == ("all", "a-1", ("x", "y"), -0.5)
    assert (chat.priority, chat.passes, chat.context) == (-2, 3, "full")
    assert parse_line(line(text="t", weight=10, until_loss=0.5)).until_loss == 0.5
    assert parse_line(line(text="t", tags=["b", "a", "b"])).tags == ("b", "a")
    assert parse_line(line(prompt="p", completion="c", **common)).completion == "c"
    assert parse_line(line(text="t")) == Example(text="t")
    assert parse_line(line(text="t", id=7)).id == "7"


@pytest.mark.parametrize(
    ("raw", "field", "says"),
    [
        (b"", None, "not JSON"),
        (b"{", None, "not JSON"),
        (b'{"text": "a"} x', None, "column 15"),
        (b"12", None, "bare number"),
        (b"[]", None, "bare array"),
        (b"null", None, "bare null"),
        (b'{"text": NaN}', None, "NaN is not JSON"),
        (b'{"text": "a", "weight": -Infinity}', None, "-Infinity is not JSON"),
        (b'{"text": "a", "weight": 1e999}', None, "1e999"),
        (b'{"text": "a", "weight": ' + b"9" * 5000 + b"}", None, "too many digits"),
        (b'{"text": ' + b"[" * 100_000 + b"}", None, "nested too deeply"),
        (b'{"text": "a", "text": "b"}', "text", "given twice"),
        (b'{"text": "\xff"}', None, "not UTF-8: byte 0xff at position 10"),
        (b'{"text": "\\ud800"}', None, "surrogate"),
        (b"{}", None, 'needs "messages"'),
        (line(txt="a"), "txt", "did you mean `text`?"),
        (line(text="a", prioritty=1), "prioritty", "did you mean `priority`?"),
        (line(text="a", zzz=1), "zzz", "allowed here: text, id"),
        (line(text="a", train_on="all"), "train_on", "unknown field"),
        (line(text="a", prompt="b", completion="c"), "text", "prompt and text in one line"),
        (line(prompt="a"), "completion", "missing"),
        (line(completion="a"), None, 'needs "messages"'),
        (line(prompt="a", completion=" \n"), "completion", "is empty"),
        (line(prompt="", completion="a"), "prompt", "is empty"),
        (line(text=3), "text", "must be a string, not the number 3"),
        (line(text="a", id=True), "id", "must be a string, not a boolean"),
        (line(text="a", id=""), "id", "1 to 256 characters"),
        (line(text="a", tags="x"), "tags", "array of strings"),
        (line(text="a", tags=[1]), "tags", "array of strings"),
        (line(text="a", weight=0), "weight", "trains nothing"),
        (line(text="a", weight=True), "weight", "must be a number"),
        (line(text="a", weight=10**40), "weight", "too large"),
        (line(text="a", priority=1.5), "priority", "whole number"),
        (line(text="a", priority=2**40), "priority", "between"),
        (line(text="a", passes=0), "passes", "between 1 and"),
        (line(text="a", until_loss=0), "until_loss", "greater than 0"),
        (line(messages=CHAT, train_on="first"), "train_on", '"last" or "all"'),
        (line(messages=CHAT, train_on=[]), "train_on", '"last" or "all"'),
        (line(messages=CHAT, tools=[]), "tools", "non-empty array"),
        (line(messages=[]), "messages", "non-empty array"),
        (line(messages=["hi"]), "messages", "non-empty array of objects"),
        (line(messages=CHAT[:1]), "messages", "ends with user"),
        (line(messages=[*CHAT, CHAT[1]]), "messages[2].role", "assistant cannot come after assistant"),
        (line(messages=CHAT[1:]), "messages[0].role", "assistant cannot come first"),
        (line(messages=[{"role": "bot", "content": "x"}]), "messages[0].role", "must be one of system"),
        (line(messages=[{"role": {}, "content": "x"}]), "messages[0].role", "must be one of system"),
        (line(messages=[{"role": "user", "contnt": "x"}]), "messages[0].contnt", "did you mean `content`?"),
        (line(messages=[CHAT[0], {"role": "assistant"}]), "messages[1].content", "not null"),
        (line(messages=[CHAT[0], {"role": "assistant", "content": ""}]), "messages[1].content", "is empty"),
        (line(messages=[*CHAT, {"role": "tool", "content": "x"}]), "messages[2].role", "called no tool"),
        (
            line(messages=[{**CHAT[0], "tool_calls": [{}]}, CHAT[1]]),
            "messages[0].tool_calls",
            "only the assistant",
        ),
        (
            line(messages=[{**CHAT[0], "reasoning": "x"}, CHAT[1]]),
            "messages[0].reasoning_content",
            "only the assistant",
        ),
        (
            line(messages=[CHAT[0], {**CHAT[1], "reasoning": "x", "reasoning_content": "y"}]),
            "messages[1].reasoning",
            "the same as reasoning_content",
        ),
        (
            line(messages=[{**CHAT[0], "tool_call_id": "1"}, CHAT[1]]),
            "messages[0].tool_call_id",
            "only a tool",
        ),
        (line(messages=CHAT, context="half"), "context", '"frozen" or "full"'),
        (line(text="a", context="full"), "context", "unknown field"),
        (line(text="a", weight=-1.5), "weight", "between -1 (unlearn) and 10"),
        (line(text="a", weight=10.5), "weight", "between -1 (unlearn) and 10"),
        (line(text="a", weight=-0.5, until_loss=1), "until_loss", "training.unlearn_until_loss"),
        (line(text="a", tags=["x"] * 17), "tags", "at most 16"),
        (line(text="a", tags=["x" * 65]), "tags", "of at most 64 characters each"),
        (line(text="a", tags=[" "]), "tags", "array of strings"),
        (line(messages=CHAT, tools=[{}]), "tools[0].function", "must be an object with a name"),
        (
            line(messages=CHAT, tools=[{"type": "retrieval", "function": {"name": "f"}}]),
            "tools[0].type",
            'must be "function"',
        ),
        (line(messages=CHAT, tools=[{"function": {"name": ""}}]), "tools[0].function.name", "is empty"),
        *(
            (
                line(
                    messages=[
                        CHAT[0],
                        {
                            "role": "assistant",
                            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
                        },
                    ]
                ),
                "messages[1].tool_calls[0].function.arguments",
                "must be an object",
            )
            for arguments in ("{", "[]", 3, "[" * 100_000, '"x"', False)
        ),
    ],
)
def test_a_bad_line_has_one_reason_and_names_the_field(raw, field, says):
    error = reason(raw)
    assert error.field == field
    assert says in error.reason


def test_tools_may_be_called_and_answered():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": ""},
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        CHAT[1],
    ]
    said = {"role": "assistant", "tool_calls": [call]}  # null says nothing
    assert parse_line(line(messages=messages)).messages == (*messages[:2], said, *messages[3:])
    assert parse_line(line(messages=messages[:3])).messages


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"x": "\\ud83d"}', "surrogate"),  # escaped twice in the line, so that only this text has it
        ('{"x": NaN}', "NaN is not JSON"),
        ('{"x": 1, "x": 2}', "given twice"),
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_arguments_given_as_text_are_as_strict_as_the_line(arguments, says):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    error = reason(line(messages=[CHAT[0], {"role": "assistant", "tool_calls": [call]}]))
    assert error.field == "messages[1].tool_calls[0].function.arguments"
    assert says in error.reason


@pytest.mark.parametrize(
    "more",
    [
        {
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
            "reasoning": None,
        },
        {"refusal": None, "annotations": []},
    ],
    ids=["vllm", "openai"],
)
def test_an_answer_may_be_dropped_as_a_server_gave_it(more):
    assert parse_line(line(messages=[CHAT[0], CHAT[1] | more])) == parse_line(line(messages=CHAT))
    error = reason(line(messages=[CHAT[0], CHAT[1] | {"refusal": "No."}]))
    assert error.field == "messages[1].refusal"


@pytest.mark.parametrize("weight", [0.5, 2, -1, True, "1", []])
def test_the_weight_of_a_message_is_0_or_1(weight):
    error = reason(line(messages=[CHAT[0], CHAT[1] | {"weight": weight}]))
    assert (error.field, "must be 0 or 1" in error.reason) == ("messages[1].weight", True)
    assert reason(line(messages=[CHAT[0] | {"weight": 1}, CHAT[1]])).field == "messages[0].weight"
    assert "nothing is trained" in reason(line(messages=[CHAT[0], CHAT[1] | {"weight": 0}])).reason


def test_content_may_be_one_part_of_text():
    said = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    assert parse_line(line(messages=said)) == parse_line(line(messages=CHAT))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}],
            "no text (image_url): only text is trained",
        ),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "no text (input_audio)"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "write them as one string"),
        ([], "write them as one string"),
        ([{"type": "text", "text": 7}], "write them as one string"),
        (["a"], "no text (a string)"),
        ([{"type": "text", "text": " "}], "is empty"),
    ],
)
def test_what_is_no_text_is_named(parts, says):
    error = reason(line(messages=[{"role": "user", "content": parts}, CHAT[1]]))
    assert (error.field, says in error.reason) == ("messages[0].content", True), error.reason


def test_null_is_left_out():
    """As exporters write it that put every column into every row."""
    row = {
        "messages": None,
        "tools": None,
        "prompt": None,
        "completion": None,
        "text": "t",
        "id": None,
        "weight": None,
    }
    assert parse_line(line(**row)) == Example(text="t")
    assert 'needs "messages"' in reason(line(text=None)).reason
    assert reason(line(text="t", txet=None)).field == "txet", "a misspelt name is one, whatever it says"


def test_strings_are_kept_to_the_letter():
    text = " \t Zoë 😀 \u2028 \\ud83d \x00"
    assert parse_line(line(text=text)).text == text
    assert parse_line(json.dumps({"text": text}, ensure_ascii=False).encode()).text == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(
    [
        *COMMON,
        "messages",
        "prompt",
        "completion",
        "text",
        "train_on",
        "tools",
        "role",
        "content",
        "tool_calls",
    ]
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "bot"])
messages = st.lists(st.dictionaries(names, json_values | roles, max_size=4), max_size=4)
objects = st.dictionaries(names, json_values | messages | st.just(CHAT), max_size=6)


def parses_or_says_why(raw: bytes) -> None:
    try:
        parsed = parse_line(raw)
    except ExampleError as refused:
        said = str(refused)
        assert 0 < len(said) < 2000
    else:
        assert sum(x is not None for x in (parsed.messages, parsed.completion, parsed.text)) == 1


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode))
@example(b'{"a":' * 5000)
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_an_example_or_an_example_error(raw):
    parses_or_says_why(raw)


@settings(max_examples=300, deadline=None)
@given(objects, st.data())
def test_any_json_near_a_valid_line_is_an_example_or_an_example_error(value, data):
    raw = json.dumps(value).encode()
    parses_or_says_why(raw)
    at = data.draw(st.integers(0, len(raw)))
    parses_or_says_why(raw[:at] + data.draw(st.binary(max_size=3)) + raw[at:])
    parses_or_says_why(raw[:at])


# --- tokens and loss mask, with a real tokenizer ---


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_dir)


@pytest.fixture
def with_template(tokenizer):
    """The same tokenizer with another chat template."""
    original = tokenizer.chat_template

    def use(template):
        tokenizer.chat_template = template
        return tokenizer

    yield use
    tokenizer.chat_template = original


def only(example, tokenizer, **options):
    """The one sequence of an example."""
    (encoded,) = encode(example, tokenizer, **options)
    return encoded


def trained_text(encoded, tokenizer) -> str:
    return tokenizer.decode([token for token, on in zip(encoded.ids, encoded.trained, strict=True) if on])


def chat(*turns: str, **fields) -> Example:
    roles = ["user", "assistant"]
    return Example(
        messages=tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)), **fields
    )


ANSWERS = ["Ada.", "\n\nTwo lines\nof text", " leading and trailing ", "Zoë 😀", "```py\nx = 1\n```", "<b>"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_of_a_chat_only_the_answer_and_its_end_token_are_trained(tokenizer, answer):
    encoded = only(chat("Who?", answer), tokenizer, max_tokens=100)
    assert trained_text(encoded, tokenizer) == answer + "<|im_end|>"
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    served = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(served)] == served  # what the server sees before it answers
    assert encoded.trained == [False] * len(served) + [True] * (len(encoded.ids) - len(served))


def test_last_turn_or_all_turns(tokenizer):
    turns = ("Who?", "Ada.", "When?", "1815.")
    last = only(chat(*turns), tokenizer, max_tokens=100)
    assert trained_text(last, tokenizer) == "1815.<|im_end|>"
    by_line = only(chat(*turns, train_on="all"), tokenizer, max_tokens=100)
    assert trained_text(by_line, tokenizer) == "Ada.<|im_end|>1815.<|im_end|>"
    assert by_line == only(chat(*turns), tokenizer, max_tokens=100, train_on="all")
    assert by_line.ids == last.ids
    assert only(chat(*turns, train_on="last"), tokenizer, max_tokens=100, train_on="all") == last


THINKING = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and (loop.last or not drop) %}<think>
{{ m.reasoning_content or '' }}</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def test_a_newline_that_would_merge_across_the_boundary_is_tokenised_as_served(with_template):
    # The prompt ends in "<think>\n" and the answer goes on with "\n": one token if tokenised at once.
    tokenizer = with_template(THINKING.replace("drop", "false"))
    example = Example(messages=(CHAT[0], {**CHAT[1], "reasoning_content": "\n\n"}))
    encoded = only(example, tokenizer, max_tokens=100)
    assert trained_text(encoded, tokenizer) == "\n\n</think>\nAda.<|im_end|>"
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    assert encoded.ids[: encoded.trained.index(True)] == tokenizer(prompt)["input_ids"]


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_the_context_it_had(with_template):
    tokenizer = with_template(THINKING.replace("drop", "true"))
    turns = chat("Who?", "Ada.", "When?", "1815.")
    assert trained_text(only(turns, tokenizer, max_tokens=100), tokenizer) == "</think>\n1815.<|im_end|>"
    first, second = encode(turns, tokenizer, max_tokens=100, train_on="all")
    assert trained_text(first, tokenizer) == "</think>\nAda.<|im_end|>"
    assert trained_text(second, tokenizer) == "</think>\n1815.<|im_end|>"
    assert "<think>\n</think>\nAda." in tokenizer.decode(first.ids)
    assert "assistant\nAda." in tokenizer.decode(second.ids), "as the server would send it"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% for m in messages %}{{ m.content.nope() }}{% endfor %}", "refuses it"),
        ("{% if add_generation_prompt %}A:{% endif %}{{ messages|length }}", "differently from what"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_does_not_fit_is_an_example_error(with_template, template, says):
    with pytest.raises(ExampleError, match=says):
        only(chat("Who?", "Ada."), with_template(template), max_tokens=100)


def test_a_template_without_an_end_token_trains_to_the_end(with_template):
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert trained_text(only(chat("Who?", "Ada."), tokenizer, max_tokens=100), tokenizer) == " Ada.\n"


def test_tools_and_tool_answers_reach_the_template(with_template):
    tokenizer = with_template(
        "{{ tools[0].function.name }}|{% for m in messages %}{{ m.role }}={{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum"}}]}
    messages = [CHAT[0], call, {"role": "tool", "content": "4"}, CHAT[1]]
    tools = [{"type": "function", "function": {"name": "sum"}}]
    (encoded,) = encode_chat(messages, tools, tokenizer, only_last=False)
    assert trained_text(encoded, tokenizer) == "CALL sum<|im_end|>Ada.<|im_end|>"
    assert tokenizer.decode(encoded.ids).startswith("sum|user=Who?")


@pytest.mark.parametrize(
    ("prompt", "completion"), [("The capital of F", "rance is Paris."), ("a\n", "\nb"), ("x", " y")]
)
def test_a_completion_is_trained_with_its_end_and_the_prompt_is_not(tokenizer, prompt, completion):
    encoded = only(Example(prompt=prompt, completion=completion), tokenizer, max_tokens=100)
    assert trained_text(encoded, tokenizer) == completion + tokenizer.eos_token
    context = encoded.ids[: encoded.trained.index(True)]
    assert context == tokenizer(prompt)["input_ids"]


def _begins_with_a_space():
    """As TinyLlama's and Mistral 7B's first tokenizers, which put a space before every text by a rule of their own."""
    tokenizer = copy.deepcopy(tokenizer_of("mistral"))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The server serv", "es the model."), ("Answer: ", "Paris."), ("a\n", "\nb"), ("Wr", "ite 東京 é"),
     ("Answer:  ", "  checkpoint"), ("x", " y"), ("Ilsa", ".")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["mistral", "first", "gemma3", "qwen3"])
def test_a_completion_goes_on_where_the_prompt_ends_whatever_a_tokenizer_puts_before_a_text(
    name, prompt, completion
):
    words = _begins_with_a_space() if name == "first" else tokenizer_of(name)
    encoded = only(Example(prompt=prompt, completion=completion), words, max_tokens=100)
    start = encoded.trained.index(True)
    assert encoded.ids[:start] == words(prompt)["input_ids"], "as the completions API has it"
    assert words.decode(encoded.ids[:-1]) == prompt + completion


def test_of_a_text_everything_but_the_first_token_is_trained(tokenizer):
    encoded = only(Example(text="Hello there, Ada"), tokenizer, max_tokens=100)
    assert encoded.trained == [False] + [True] * (len(encoded.ids) - 1)
    assert tokenizer.decode(encoded.ids) == "Hello there, Ada" + tokenizer.eos_token


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("words", [10, 13, 14, 15, 40, 80])
def test_a_long_text_is_trained_once_in_windows_that_overlap(tokenizer, with_start, words):
    text = ("<|im_start|>" if with_start else "") + " ".join(f"w{i}" for i in range(words))
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert (whole[0] == tokenizer.bos_token_id) == with_start
    windows = encode(Example(text=text), tokenizer, max_tokens=40)
    trained = [token for part in windows for token, on in zip(part.ids, part.trained, strict=True) if on]
    assert trained == whole[1:], "each token but the first, once, in order"
    assert all(len(part.ids) <= 40 for part in windows)
    assert len(windows) == 1 + max(-(-(len(whole) - 40) // (30 - with_start)), 0)
    seen = whole[:40]
    for part in windows[1:]:
        context = part.ids[: part.trained.index(True)]
        assert context == whole[:with_start] + seen[-10:], (
            "a quarter of the window, after the start token if there is one"
        )
        seen += part.ids[len(context) :]
    assert windows == encode(Example(text=text), tokenizer, max_tokens=100, context_length=40)


@pytest.mark.parametrize(
    ("family", "said"), [("llama", 64), ("gpt2", 64), ("gptj", 64), ("mamba2", None), ("bloom", None)]
)
def test_how_long_a_text_may_be_is_known_by_whatever_name_a_family_has_for_it(tmp_path, family, said):
    """Beyond its table of positions GPT-2 reads other memory, or ends the trainer."""
    names = {"gpt2": "n_positions", "gptj": "n_positions"}
    AutoConfig.for_model(family, **{names.get(family, "max_position_embeddings"): 64}).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    if said is None:
        config.pop("max_position_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == said
    (tmp_path / "config.json").write_text("{}")
    assert context_length(tmp_path) is None


@pytest.mark.parametrize(
    ("generation", "said"),
    [(None, {"<s>", "</s>"}), ([2, 3], {"</s>", "<unk>"}), ({}, {"</s>"}), (0, {"</s>", "<pad>"})],
)
def test_an_answer_ends_where_the_server_stops(tmp_path, generation, said):
    """At the tokens that generation_config.json names, or config.json without one, and at the tokenizer's own."""
    word_tokenizer(tmp_path)
    AutoConfig.for_model("llama", eos_token_id=1).save_pretrained(tmp_path)
    if generation is not None:
        named = {"eos_token_id": generation} if generation != {} else {}
        (tmp_path / "generation_config.json").write_text(json.dumps(named))
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert stop_texts(tmp_path, words) == said
    words.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} <unk> </s> {% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    messages = [CHAT[0], {"role": "assistant", "content": "w7"}]
    (part,) = encode_chat(messages, None, words, only_last=True, stops=said)
    trained = part.ids[part.trained.index(True) :]
    assert trained == [11, 3] if "<unk>" in said else trained == [11, 3, 2]


def test_every_window_begins_with_all_that_a_text_begins_with(tmp_path):
    """As GLM-4's two tokens, neither of which is called its start token."""
    word_tokenizer(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    words.bos_token = None
    given = [(name, words.convert_tokens_to_ids(name)) for name in ("<pad>", "<s>", "</s>")]
    words._tokenizer.post_processor = TemplateProcessing(single="<pad> <s> $A </s>", special_tokens=given)
    windows = encode(Example(text=" ".join(f"w{i}" for i in range(50))), words, max_tokens=20)
    assert len(windows) > 2
    assert all(part.ids[:2] == [0, 1] and len(part.ids) <= 20 for part in windows)
    trained = [token for part in windows for token, on in zip(part.ids, part.trained, strict=True) if on]
    assert trained[1:] == [*range(4, 54), 2]


def test_what_does_not_fit_is_refused_with_both_numbers(tokenizer):
    encoded = only(Example(text="one two three"), tokenizer, max_tokens=4)
    assert len(encoded.ids) == 4
    with pytest.raises(ExampleError, match=r"4 tokens, and training\.max_tokens is 3"):
        only(Example(prompt="one", completion=" two three"), tokenizer, max_tokens=3)
    with pytest.raises(ExampleError, match=r"4 tokens, and the model's context is 3"):
        only(Example(prompt="one", completion=" two three"), tokenizer, max_tokens=4, context_length=3)
    too_many = "one" + " two" * (
        40 + 7 * 30 - 1
    )  # and the end-of-text token: one more than eight windows hold
    with pytest.raises(ExampleError, match=r"251 tokens, and training\.max_tokens is 40"):
        encode(Example(text=too_many), tokenizer, max_tokens=40)


def test_a_limit_on_what_has_gradients_is_none_on_what_is_read_before(tokenizer):
    example = Example(prompt="one two three four", completion=" five six")
    encoded = only(example, tokenizer, max_tokens=7, max_trained=3)
    assert (len(encoded.ids), encoded.trained_tokens) == (7, 3)
    first_on = r"3 tokens from the first trained one on, and training\.max_trained_tokens is 2"
    with pytest.raises(ExampleError, match=first_on):
        only(example, tokenizer, max_tokens=7, max_trained=2)
    everything = r"7 tokens, all of them with gradients, and training\.max_trained_tokens is 3"
    for full in ({"context": "full"}, {"freezes": False}):
        with pytest.raises(ExampleError, match=everything):
            only(example, tokenizer, max_tokens=7, max_trained=3, **full)
    with pytest.raises(ExampleError, match=everything):
        only(replace(example, context="full"), tokenizer, max_tokens=7, max_trained=3)
    only(replace(example, context="frozen"), tokenizer, max_tokens=7, max_trained=3, context="full")
    chat_of_two = chat("one", "two", "three", "four", train_on="all")
    whole = only(chat_of_two, tokenizer, max_tokens=100)
    later_turns_too = len(whole.ids) - whole.trained.index(True)
    assert only(chat_of_two, tokenizer, max_tokens=100, max_trained=later_turns_too) == whole
    with pytest.raises(ExampleError, match=f"{later_turns_too} tokens from the first trained one on"):
        only(chat_of_two, tokenizer, max_tokens=100, max_trained=later_turns_too - 1)


def test_a_text_is_cut_into_windows_that_may_have_gradients(tokenizer):
    text = Example(text=" ".join(f"w{i}" for i in range(40)))
    assert encode(text, tokenizer, max_tokens=100, max_trained=40) == encode(text, tokenizer, max_tokens=40)


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_any_answer_survives_the_round_trip(tokenizer, question, answer):
    assume(tokenizer.decode(tokenizer(answer)["input_ids"]) == answer)  # this vocabulary lacks rare bytes
    encoded = only(chat(question, answer), tokenizer, max_tokens=10_000)
    assert trained_text(encoded, tokenizer) == answer + "<|im_end|>"
