"""Loss masks over the chat templates of several model families: exactly what the assistant says, and its end.

Every check goes round: messages, template, tokens, mask, and back to text.
"""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from chat_families import FAMILIES, Family, Message, tokenizer_of
from hogwild.cautions import cautions
from hogwild.chat import Chat
from hogwild.chat_settings import ChatSettings
from hogwild.encoding import Encoded
from hogwild.errors import ExampleError
from hogwild.examples import Example, encode
from hogwild.messages import parse_messages

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str | None = None, **more: Any) -> Message:
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def call(number: int, city: str = "Oslo") -> Message:
    return {
        "id": f"call{number:05}",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": city}},
    }


def tool(number: int, text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05}"}


SYSTEM = {"role": "system", "content": "Answer in one word."}
SINGLE = [user("Who wrote it?"), assistant("Ada.")]
MULTI = [*SINGLE, user("When?"), assistant("In 1843,\n\n- I think."), user("Where?"), assistant("London")]
ASKED = [user("Weather in Oslo?"), assistant(tool_calls=[call(1)])]
TOLD = [*ASKED, tool(1, '{"sky": "grey"}'), assistant("Grey.")]
CONVERSATIONS: dict[str, list[Message]] = {
    "single": SINGLE,
    "multi": MULTI,
    "system": [SYSTEM, *SINGLE],
    "system-multi": [SYSTEM, *MULTI],
    "white-space": [user("  Who? \n"), assistant("\n\n  Two lines \n of text \n\n"), user(" ? "), assistant(" x ")],
    "unicode": [user("Wer? 😀"), assistant("Zoë 😀, naïve – 東京")],
    "markup": [user("<b>[b]{{ x }}{% y %}"), assistant("```py\nx = 1\n```\n<b>|[INST|{{ z }}</b>")],
    "call": ASKED,
    "call-answered": TOLD,
    "call-and-on": [SYSTEM, *TOLD, user("And in Rome?"), assistant(tool_calls=[call(2, "Rome")]),
                    tool(2, "sunny"), assistant("Sunny."), user("Thanks"), assistant("You are welcome.")],
    "calls": [user("Oslo and Rome?"), assistant(tool_calls=[call(1), call(2, "Rome")]),
              tool(1, "grey"), tool(2, "sunny"), assistant("Grey and sunny.")],
    "thought": [user("Who?"), assistant("Ada.", reasoning_content="The first\n\nprogrammer.")],
    "thoughts": [SYSTEM, user("Who?"), assistant("Ada.", reasoning_content="Let me see."), user("When?"),
                 assistant("1843", reasoning_content="Note G."), user("Sure?"), assistant("Yes.")],
    "thought-call": [user("Weather?"), assistant(reasoning_content="Ask.", tool_calls=[call(1)]), tool(1, "grey"),
                     assistant("Grey.", reasoning_content="Grey it is."), user("And now?"), assistant("Still grey.")],
}  # fmt: skip


def supports(family: Family, messages: list[Message]) -> bool:
    calls = [len(message.get("tool_calls", [])) for message in messages]
    return (
        (family.systems or messages[0]["role"] != "system")
        and (family.tools or not any(calls))
        and (family.parallel_calls or max(calls) < 2)
        and (family.reasoning or not any("reasoning_content" in message for message in messages))
    )


CASES = [
    pytest.param(family, messages, train_on, id=f"{family.name}-{name}-{train_on}")
    for family in FAMILIES
    for name, messages in CONVERSATIONS.items()
    if supports(family, messages)
    for train_on in ("last", "all")
]


def runs(encoded: Encoded) -> list[tuple[int, int]]:
    """Trained stretches, as (first, after the last)."""
    edges = [
        i
        for i, (a, b) in enumerate(zip([False, *encoded.trained], [*encoded.trained, False], strict=True))
        if a != b
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def as_served(message: Message) -> Message:
    """The server's order of keys in a tool call, and its content for none (test_the_prompt_is_the_servers_own)."""
    calls = [
        {
            "id": one["id"],
            "function": {"arguments": one["function"]["arguments"], "name": one["function"]["name"]},
        }
        for one in message.get("tool_calls", [])
    ]
    return {"content": "", **message, **({"tool_calls": calls} if calls else {})}


def check_masks(family: Family, messages: list[Message], tools: Any, train_on: Any) -> list[Encoded]:
    """Every trained turn is trained once, after exactly the served prompt, and nothing else is."""
    tokenizer = family.tokenizer
    parts = encode(
        Example(messages=tuple(messages), tools=tuple(tools) if tools else None, train_on=train_on),
        tokenizer,
        max_tokens=100_000,
        stops=family.stops,
    )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = turns[-1:] if train_on == "last" else turns
    found = [(part, *run) for part in parts for run in runs(part)]
    assert len(found) == len(turns)
    for i, (part, start, end) in zip(turns, found, strict=True):
        prompt = tokenizer.apply_chat_template(
            [as_served(message) for message in messages[:i]],
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
        )
        assert part.ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer.decode(part.ids[:end])[len(tokenizer.decode(part.ids[:start])) :]
        assert said == family.says(messages[i]) + family.end
        assert tokenizer.decode([part.ids[end - 1]]) == family.end
        assert part.ids[end - 1] not in part.ids[start : end - 1]
    assert all(len(part.ids) == runs(part)[-1][1] for part in parts), "nothing follows the last trained token"
    return parts


@pytest.mark.parametrize(("family", "messages", "train_on"), CASES)
def test_what_the_assistant_says_and_its_end_are_trained_after_the_served_prompt(family, messages, train_on):
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    check_masks(family, messages, tools, train_on)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_sequence_holds_all_turns_unless_the_template_changes_earlier_ones(family):
    count = len(check_masks(family, MULTI, None, "all"))
    assert count == (3 if family.reasoning or family.name == "gemma4" else 1), (
        "thoughts of earlier turns are dropped"
    )


def test_a_context_that_the_server_writes_differently_gets_a_sequence_of_its_own():
    """Mistral's: tools move on with the questions; calls are answered name first, and served arguments first."""
    (mistral,) = (family for family in FAMILIES if family.name == "mistral")
    assert len(check_masks(mistral, CONVERSATIONS["call-and-on"][1:], TOOLS, "all")) == 5
    assert len(check_masks(mistral, TOLD, TOOLS, "all")) == 2
    assert len(check_masks(mistral, MULTI, TOOLS, "all")) == 3


def test_a_call_ends_with_the_token_that_begins_the_tools_answer_where_a_template_writes_no_end():
    """GLM's, whose answers end with the token that begins the next turn."""
    (glm4,) = (family for family in FAMILIES if family.name == "glm4")
    tokenizer = glm4.tokenizer
    for messages in (ASKED, TOLD):  # as the last turn, and in the middle
        example = Example(messages=tuple(messages), tools=tuple(TOOLS), train_on="all")
        (part,) = encode(example, tokenizer, max_tokens=1000, stops=glm4.stops)
        said = [tokenizer.decode(part.ids[start:end]) for start, end in runs(part)]
        assert said == ['weather\n{"city": "Oslo"}<|observation|>', "Grey.<|user|>"][: len(said)]
        assert len(said) == (1 if messages is ASKED else 2)


def said(name: str, messages: list[Message]) -> list[str]:
    """What is trained, as text."""
    (family,) = (family for family in FAMILIES if family.name == name)
    parts = encode(Example(messages=tuple(messages)), family.tokenizer, max_tokens=1000, stops=family.stops)
    return [family.tokenizer.decode(part.ids[start:end]) for part in parts for start, end in runs(part)]


@pytest.mark.parametrize("reasoning", [{}, {"reasoning_content": "Ask."}], ids=["plain", "thought"])
def test_a_model_that_is_served_without_thinking_is_not_taught_to_think(reasoning):
    """Gemma 4's, which would write the thought before a call that its prompt has none of."""
    messages = [ASKED[0], {**ASKED[1], **reasoning}]
    assert said("gemma4", messages) == [
        '<|tool_call>call:weather{"city": "Oslo"}<tool_call|><|tool_response>'
    ]
    assert said("gemma4", [*messages, *TOLD[2:]]) == ["Grey.<turn|>"]


def test_a_call_without_a_thought_ends_one_where_the_prompt_begins_it():
    """GLM 4.7's, whose call ends with the token that begins the tool's answer."""
    assert said("glm4.7", ASKED) == ['</think><tool_call>weather{"city": "Oslo"}</tool_call><|observation|>']


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking", "nemotron2", "deepseek-r1"])
def test_a_thought_in_the_content_is_that_of_the_prompt(name):
    """As data sets have it that were written by R1."""
    (family,) = (family for family in FAMILIES if family.name == name)
    apart = [user("Who?"), assistant("Ada.", reasoning_content="The first\n\nprogrammer.")]
    together = [user("Who?"), assistant("<think>\nThe first\n\nprogrammer.\n</think>\n\nAda.")]
    assert said(name, together) == said(name, apart) == [family.says(apart[1]) + family.end]


@pytest.mark.parametrize(
    ("weights", "train_on", "trained"),
    [
        ((0, None, None), "all", [3, 5]),
        ((1, None, None), "last", [1, 5]),
        ((None, 1, 0), "last", [3]),
        ((None, 0, 1), "last", [5]),
    ],
)
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[2]], ids=lambda family: family.name)
def test_a_message_may_say_whether_it_is_trained(family, weights, train_on, trained):
    """In one sequence, or where the template changes earlier turns in several."""
    turns = zip(MULTI[1::2], weights, strict=True)
    said = [turn if weight is None else turn | {"weight": weight} for turn, weight in turns]
    messages = tuple(turn for pair in zip(MULTI[::2], said, strict=True) for turn in pair)
    parts = encode(Example(messages=messages, train_on=train_on), family.tokenizer, max_tokens=1000)
    texts = [family.tokenizer.decode(part.ids[start:end]) for part in parts for start, end in runs(part)]
    assert texts == [family.says(MULTI[i]) + family.end for i in trained]


def test_a_last_turn_that_is_not_to_be_trained_is_refused_where_it_alone_would_be():
    messages = (*MULTI[:-1], MULTI[-1] | {"weight": 0})
    with pytest.raises(ExampleError, match=r"messages: the last turn has weight 0"):
        encode(Example(messages=messages), tokenizer_of("chatml"), max_tokens=1000)


THOUGHT = "<think>\nThe first.\n</think>\n\nAda."


@pytest.mark.parametrize(
    "answer", [assistant("Ada."), assistant("Ada.", reasoning_content="The first."), assistant(THOUGHT)]
)
def test_settings_of_the_server_that_end_the_thought_leave_it_out(answer):
    """Qwen3 that is served with {"enable_thinking": false}."""
    tokenizer = ChatSettings(None, {"enable_thinking": False}).on(tokenizer_of("qwen3"))
    example = Example(messages=(user("Who?"), answer))
    (part,) = encode(example, tokenizer, max_tokens=1000)
    ((start, end),) = runs(part)
    assert tokenizer.decode(part.ids[:start]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(part.ids[start:end]) == "Ada.<|im_end|>"
    said = [caution.code for caution in cautions(example, tokenizer)]
    assert said == ([] if answer == assistant("Ada.") else ["ignored"])


def test_words_that_the_template_takes_for_a_thought_are_not_taught_after_one():
    tokenizer = ChatSettings(None, {"enable_thinking": False}).on(tokenizer_of("qwen3"))
    with pytest.raises(ExampleError, match=r"messages\[1\]: .* differently"):
        encode(
            Example(messages=(user("How?"), assistant("With </think>, then."))), tokenizer, max_tokens=1000
        )


# --- any conversation ---

plain = st.text(st.sampled_from("abcxyz ABC 0123 .,!?\n\n\t<|>[]/{}%#\"'\\é😀東_▁"), min_size=1, max_size=24)
answers = plain.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw: Any, family: Family) -> tuple[list[Message], bool]:
    """Messages in an order that a line may have, whatever the family supports; and whether tools are given."""
    # Anybody but the assistant may write what a template writes; Qwen's takes a whole tool response for one.
    added = [str(token.content) for token in family.tokenizer.added_tokens_decoder.values()]
    special = st.sampled_from([token for token in added if "tool_response" not in token])
    words = (
        st.lists(plain | special, min_size=1, max_size=3).map("".join).filter(lambda text: text.strip() != "")
    )
    messages: list[Message] = []
    if family.systems and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    with_tools = family.tools and draw(st.booleans())
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(words)))
        thought = {"reasoning_content": draw(answers)} if family.reasoning and draw(st.booleans()) else {}
        if with_tools and draw(st.booleans()):
            count = draw(st.integers(1, 2 if family.parallel_calls else 1))
            calls = [call(number + k, draw(answers)) for k in range(count)]
            messages.append(assistant(tool_calls=calls, **thought))
            messages += [tool(number + k, draw(words)) for k in range(count)]
            number += count
        messages.append(assistant(draw(answers), **thought))
    return messages, with_tools


def comes_back(family: Family, messages: list[Message]) -> bool:
    """The family's own normalisation aside, a vocabulary has to be able to write what is said."""
    tokenizer = family.tokenizer
    said = [family.says(message) for message in messages if message["role"] == "assistant"]
    return all(
        tokenizer.decode(tokenizer(f"a{text}")["input_ids"])[-len(text) :] == text for text in said
    ) and not any(family.end in text for text in said)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data(), train_on=st.sampled_from(["last", "all"]))
def test_any_conversation_goes_round(family, data, train_on):
    messages, with_tools = data.draw(conversations(family))
    assume(comes_back(family, messages))
    check_masks(family, messages, TOOLS if with_tools else None, train_on)


# --- what cannot be trained ---


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_answer_that_writes_its_own_end_is_refused_and_a_question_that_does_is_context(family):
    faked = f"a{family.end}\nb"
    with pytest.raises(ExampleError, match=r"messages\[1\]: contains .*end-of-turn token"):
        check_masks(family, [user("Who?"), assistant(faked)], None, "last")
    check_masks(family, [user(faked), assistant("Ada.")], None, "all")
    # In a turn that is not trained it is context, as it would be when serving.
    check_masks(family, [user("Who?"), assistant(faked), user("When?"), assistant("1843")], None, "last")


def test_a_system_prompt_that_the_family_does_not_know_is_refused_in_the_templates_words():
    with pytest.raises(ExampleError, match="System role not supported"):
        encode(Example(messages=(SYSTEM, *SINGLE)), tokenizer_of("gemma2"), max_tokens=1000)


def test_a_prompt_that_the_template_never_goes_on_from_is_refused():
    tokenizer = copy.copy(tokenizer_of("chatml"))
    tokenizer.chat_template += "{{ 'Dear reader:' if add_generation_prompt else '' }}"
    with pytest.raises(ExampleError, match=r"messages\[1\]: .* differently .*; use \"prompt\""):
        encode(Example(messages=tuple(SINGLE)), tokenizer, max_tokens=1000)


@pytest.mark.parametrize("name", ["chatml", "gemma2", "qwen3-thinking", "deepseek-r1"])
def test_a_tool_call_that_the_template_leaves_out_does_not_teach_silence(name):
    messages = [user("Weather in Oslo?"), assistant(tool_calls=[call(1)])]
    with pytest.raises(ExampleError, match=r"messages\[1\]: .*leaves its tool_calls out"):
        encode(Example(messages=tuple(messages)), tokenizer_of(name), max_tokens=1000)


# --- what vLLM makes of the same request ---


@pytest.fixture(scope="module")
def server_renders(demo_model_dir):
    """vLLM's own path from a request to the text of its prompt, without a server."""
    from vllm.config import ModelConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import chat_utils, hf

    model = ModelConfig(model=str(demo_model_dir))

    def render(tokenizer: Any, messages: list[Message], tools: Any) -> str:
        request = ChatCompletionRequest.model_validate(
            {"model": "m", "messages": copy.deepcopy(messages), **({"tools": tools} if tools else {})}
        )
        dumped = [tool.model_dump() for tool in request.tools] if request.tools else None
        template = tokenizer.chat_template
        form = hf.resolve_chat_template_content_format(
            template, dumped, "auto", tokenizer, model_config=model
        )
        conversation, _, _ = chat_utils.parse_chat_messages(request.messages, model, content_format=form)
        return hf.safe_apply_chat_template(
            model,
            tokenizer,
            conversation,
            tools=dumped,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )

    return render


ODD_TOOLS = [
    {"function": {"parameters": {"type": "object"}, "return": "x", "name": "weather"}, "type": "function"}
]
WANTS_PARTS = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def as_sent(messages: list[Message]) -> list[Message]:
    """As an OpenAI client sends arguments."""
    as_text = copy.deepcopy(messages)
    for message in as_text:
        for one in message.get("tool_calls", []):
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    return as_text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_prompt_is_the_servers_own(family, server_renders):
    for name, messages in CONVERSATIONS.items():
        if not supports(family, messages):
            continue
        as_text = as_sent(messages)
        for tools in (None, TOOLS, ODD_TOOLS) if family.tools else (None,):
            ours = Chat(parse_messages(copy.deepcopy(as_text)), tools, family.tokenizer)
            for i in ours.turns:
                theirs = server_renders(family.tokenizer, as_text[:i], tools)
                assert ours.prompt(i) == theirs, (name, i, tools)


OF_PARTS = "{% for part in CONTENT %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
IN_PARTS = (
    "{% for message in messages %}{{ message.role }}:"
    "{% if message.role == 'tool' %}{{ message.content }}{% elif message.content is sequence %}PARTS{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{% if call.function.arguments is string %}?{% endif %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ message.content | length }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES_OF_PARTS = {
    "attribute": IN_PARTS.replace("PARTS", OF_PARTS.replace("CONTENT", "message.content")),
    "filtered": IN_PARTS.replace("PARTS", OF_PARTS.replace("CONTENT", "message['content'] | reverse")),
    "variable": IN_PARTS.replace(
        "PARTS", "{% set content = message.content %}" + OF_PARTS.replace("CONTENT", "content")
    ),
    "macro": "{% macro says(content) %}" + OF_PARTS.replace("CONTENT", "content") + "{% endmacro %}"
    + IN_PARTS.replace("PARTS", "{{ says(message.content) }}"),
    "text": IN_PARTS.replace("PARTS", "{{ message.content }}"),
    "the first": IN_PARTS.replace("PARTS", OF_PARTS.replace("CONTENT", "messages[0].content") + "{{ message }}"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES_OF_PARTS)
def test_content_is_in_parts_where_the_servers_is(name, server_renders):
    """Also where a template tells text from something else than content, and of what is empty, or said by a tool."""
    tokenizer = copy.copy(tokenizer_of("qwen3"))
    tokenizer.chat_template = TEMPLATES_OF_PARTS[name]
    messages = [
        {"role": "system", "content": ""},
        *as_sent(TOLD),
        user("Thanks"),
        assistant("You are welcome."),
    ]
    chat = Chat(parse_messages(copy.deepcopy(messages)), None, tokenizer)
    for i in chat.turns:
        assert chat.prompt(i) == server_renders(tokenizer, messages[:i], None)


@pytest.mark.parametrize("template", [None, WANTS_PARTS], ids=["developer", "parts"])
def test_developers_and_parts_are_the_servers_own(template, server_renders):
    tokenizer = copy.copy(tokenizer_of("qwen3"))
    tokenizer.chat_template = template or tokenizer.chat_template
    messages = [{"role": "developer", "content": "Be brief."}, *MULTI]
    chat = Chat(messages, None, tokenizer)
    assert "Be brief." in chat.prompt(2)
    for i in chat.turns:
        assert chat.prompt(i) == server_renders(tokenizer, messages[:i], None)
