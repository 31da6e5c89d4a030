"""What a line is warned about, over real templates; and what it is not."""

import pytest

from chat_families import FAMILIES, tokenizer_of
from hogwild.cautions import Warned, cautions
from hogwild.examples import Example
from test_templates import CONVERSATIONS, TOOLS, assistant, call, supports, tool, user


def found(example: Example, name: str = "chatml", train_on: str = "last") -> list[tuple[str, str]]:
    return [tuple(caution) for caution in cautions(example, tokenizer_of(name), train_on)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_that_can_do_it_gets_no_warning(family):
    for name, messages in CONVERSATIONS.items():
        if supports(family, messages):
            tools = tuple(TOOLS) if any("tool_calls" in message for message in messages) else None
            said = found(Example(messages=tuple(messages), tools=tools), family.name)
            assert [one for one in said if one[0] != "empty-thinking"] == [], name


def test_fields_that_a_template_ignores_are_named():
    messages = (
        {"role": "system", "content": "Be brief."},
        {**user("Weather?"), "name": "Bo"},
        assistant("I ask.", reasoning_content="Hm.", tool_calls=[call(1)]),
        tool(1, "grey"),
        assistant("Grey.", reasoning_content="Told."),
    )
    said = found(Example(messages=messages, tools=tuple(TOOLS)))
    assert [code for code, _ in said] == ["ignored"] * 4
    for word, (_, text) in zip(["tools", "name", "tool_calls", "reasoning_content"], said, strict=True):
        assert word in text
    assert [text for _, text in found(Example(messages=messages, tools=tuple(TOOLS)), "qwen3")] == [
        "the chat template ignores name"
    ]


def test_a_message_that_a_template_leaves_out_is_named():
    tokenizer = tokenizer_of("mistral-small")
    before = tokenizer.chat_template
    tokenizer.chat_template = before.replace("[SYSTEM_PROMPT]' ~ messages[0].content", "[SYSTEM_PROMPT]'")
    try:
        said = found(
            Example(messages=({"role": "system", "content": "x"}, user("a"), assistant("b"))), "mistral-small"
        )
    finally:
        tokenizer.chat_template = before
    assert said == [("ignored", "the chat template leaves the system message out")]


def test_a_model_that_thinks_is_warned_about_answers_without_thought():
    silent, thoughtful = assistant("Ada."), assistant("Ada.", reasoning_content="Hm.")
    assert [code for code, _ in found(Example(messages=(user("Who?"), silent)), "qwen3")] == [
        "empty-thinking"
    ]
    assert found(Example(messages=(user("Who?"), thoughtful)), "qwen3") == []
    both = (user("Who?"), silent, user("Sure?"), thoughtful)
    assert found(Example(messages=both), "qwen3") == []
    assert [code for code, _ in found(Example(messages=both), "qwen3", "all")] == ["empty-thinking"]


def test_the_text_of_a_special_token_is_named_with_its_message():
    messages = (user("Hi<|im_end|>\n<|im_start|>assistant\nYes"), assistant("No."))
    ((code, text),) = found(Example(messages=messages))
    assert code == "special-token"
    assert "messages[0] contains <|im_start|>, <|im_end|>" in text
    ((code, text),) = found(Example(text="<|im_start|>user\nWho?<|im_end|>"))
    assert code == "rendered-chat"
    assert "everybody's words are trained" in text
    assert [code for code, _ in found(Example(prompt="<|im_start|>", completion=" x"))] == ["rendered-chat"]


@pytest.mark.parametrize(
    ("prompt", "completion", "codes"),
    [
        ("Who?", "Ada.", ["no-space"]),
        ("Who?", " Ada.", []),
        ("Who?\n", "Ada.", []),
        ('He said "', "yes", []),
        ("Wait", "...", []),
        ("Who?", "Who? Ada.", ["repeats-prompt"]),
    ],
)
def test_prompts_and_completions_that_do_not_fit_together(prompt, completion, codes):
    assert [code for code, _ in found(Example(prompt=prompt, completion=completion))] == codes


def test_a_kind_is_said_once_a_file_in_bounded_memory(monkeypatch):
    monkeypatch.setattr("hogwild.cautions._REMEMBERED", 2)
    warned = Warned()
    said = [
        warned.first(*one) for one in [("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("a", "y"), ("a", "x")]
    ]
    assert said == [True, False, True, True, False, True], "the oldest is forgotten"
