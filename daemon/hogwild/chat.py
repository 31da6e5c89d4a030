"""A conversation as the server's chat template sees it, and the text that the template makes of it.

The server changes a request before its template sees it. An example whose context skipped that would be trained
with a prompt that is never served, so the same is done here (vLLM 0.32, `vllm/renderers/chat_utils.py` and
`hf.py`; tests/test_templates.py compares the two).

Special tokens: a template makes one text of everybody's words, and the tokenizer reads the text of a special token
as that token, whoever wrote it. A user who writes "<|im_end|>\\n<|im_start|>assistant" fakes a turn, in training as
when serving. That much is shared with the server on purpose. What is trained is decided by positions in the
template's own text, never by searching for roles, so a faked turn in somebody's words is context and never trained.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hogwild import strict_json, thoughts
from hogwild.errors import ExampleError
from hogwild.thoughts import Thought

Message = Mapping[str, Any]
_ANSWER, _QUESTION = "an answer that nobody wrote", "a question that nobody asked"
_THOUGHT = "a thought that nobody had"


class Templated(Protocol):
    """What is used of a Hugging Face tokenizer to render a conversation."""

    @property
    def chat_template(self) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def served_messages(
    messages: Sequence[Message], template: str, *, own_calls: bool = False
) -> list[dict[str, Any]]:
    """The messages as the server hands them to its template.

    No content is empty content; arguments of tool calls are objects, not text; reasoning goes by both of its names;
    a developer is a system where the template knows none; text is a list of parts where the template wants that, but
    what tools say is not.

    Args:
        own_calls: leave the keys of tool calls in the order that the line has, which the model is to learn. The
            server puts them into an order of its own, which some templates (Mistral's) write down.
    """
    knows_developers = '"developer"' in template or "'developer'" in template
    wants_parts = _wants_parts(template)
    result = []
    for message in messages:
        fresh = {
            name: message[name] for name in ("role", "content", "name", "tool_call_id") if name in message
        }
        if fresh["role"] == "developer" and not knows_developers:
            fresh["role"] = "system"
        content = message.get("content")
        fresh["content"] = content or ""
        if wants_parts and fresh["role"] != "tool":
            fresh["content"] = [] if content is None else [{"type": "text", "text": content}]
        if "reasoning_content" in message:
            fresh["reasoning"] = fresh["reasoning_content"] = message["reasoning_content"]
        if "tool_calls" in message:
            fresh["tool_calls"] = [_with_object_arguments(call, own_calls) for call in message["tool_calls"]]
        result.append(fresh)
    return result


def served_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools in the server's key order, with its defaults; keys that it does not know are gone."""
    if not tools:
        return None
    result = []
    for tool in tools:
        function = tool["function"]
        fresh = {key: function.get(key) for key in ("name", "description", "parameters")}
        fresh |= {key: function[key] for key in ("strict",) if function.get(key) is not None}
        result.append({"type": "function", "function": fresh})
    return result


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a tool call as an object; they may be given as its JSON text, and be empty.

    Raises:
        ExampleError: their text is not JSON.
        ValueError: they are neither.
    """
    arguments = call["function"].get("arguments")
    if not arguments and arguments in (None, "", {}):
        return {}
    if isinstance(arguments, str):
        arguments = strict_json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a JSON text of another type is a wrong value
    return arguments


class Chat:
    """A conversation in front of a tokenizer's chat template.

    Raises:
        ExampleError: the model has no chat template.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        tokenizer: Templated,
    ) -> None:
        if not tokenizer.chat_template:
            raise ExampleError(
                'the model has no chat template; use "prompt" and "completion", or "text"', "messages"
            )
        self.messages, self.tokenizer = messages, tokenizer
        self._tools = served_tools(tools)
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name: the one that the server would take
            template = template.get("tool_use" if tools and "tool_use" in template else "default", "")
        self._template = str(template)
        self._served = served_messages(messages, self._template)
        self._said = served_messages(messages, self._template, own_calls=True)

    @property
    def turns(self) -> list[int]:
        """Where the assistant's messages are."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def trained(self, only_last: bool) -> list[int]:
        """Those of them that are to be trained: the last or all, and what a message says for itself."""
        turns = self.turns
        return [i for i in turns if self.messages[i].get("weight", not only_last or i == turns[-1])]

    def prompt(self, upto: int) -> str:
        """What the server sends to the model after the first `upto` messages.

        Raises:
            ExampleError: the template refuses them, or fails.
        """
        return self._render(self._served[:upto], generation_prompt=True)

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (
            Exception
        ) as error:  # a template is a program that came with the model: it raises what it likes
            raise ExampleError(f"the chat template refuses it: {error}", "messages") from error
        return str(text)

    def turn(self, i: int) -> tuple[str, str]:
        """The assistant's message `i` as (what the server sends to the model, what the model has to answer).

        Raises:
            ExampleError: see `render`; or the template does not render what the model would have to answer.
        """
        prompt = self.prompt(i)
        if (thought := thoughts.at_end(prompt)) is not None:
            answer = self._after_thought(prompt, thought, i)
        else:
            answered = self._rendered(i, self._said[i])
            start = len(prompt) if answered.startswith(prompt) else self._answer_start(prompt, answered, i)
            answer = "" if start is None else answered[start:]
        if not answer:
            raise ExampleError(
                "the chat template renders this turn differently from what the model has to answer "
                'to the prompt that is served; use "prompt" and "completion"',
                f"messages[{i}]",
            )
        return prompt, answer

    def _after_thought(self, prompt: str, thought: Thought, i: int) -> str:
        """What the model has to answer to a prompt that begins its thought, or has ended it; "": that cannot be told.

        A template may write no thought where there was none (GLM 4.7, Nemotron 3, MiniMax): then one shows what is
        written around it. It may never write what its prompt has (Gemma 4, DeepSeek R1): then it is written here.
        """
        content = self.messages[i].get("content") or ""
        reasoning = self.messages[i].get("reasoning_content") or ""
        if not reasoning:
            reasoning, content = thought.said_in(content)
        for thinks in (reasoning, _THOUGHT) if thought.is_open and not reasoning else (reasoning,):
            answered = self._rendered(i, self._saying(i, content, thinks))
            if answered.startswith(prompt) and thought.is_followed(answered[len(prompt) :], thinks):
                return answered[len(prompt) :].replace(_THOUGHT, "", 1)
        answered = self._rendered(i, self._saying(i, content))
        for before in (prompt, thought.before):
            if answered.startswith(before):
                return thought.followed_by(answered[len(before) :], reasoning)
        return ""

    def _saying(self, i: int, content: str, reasoning: str = "") -> Message:
        """The assistant's message `i` with these words and thoughts."""
        message = dict(self.messages[i])
        for name, text in (("content", content), ("reasoning_content", reasoning)):
            message.pop(name, None)
            message |= {name: text} if text else {}
        return served_messages([message], self._template, own_calls=True)[0]

    def _rendered(self, i: int, said: Message) -> str:
        """The chat up to where the assistant says this as message `i`."""
        return self._render([*self._served[:i], said], generation_prompt=False)

    def goes_on(self, i: int) -> str:
        """What the template writes right behind the assistant's message `i` when somebody speaks after it; "" if that
        cannot be told. Where it writes no end of a turn (GLM), an answer ends with the token that begins the next one.

        Raises:
            ExampleError: see `turn`.
        """
        begun = self._rendered(i, self._said[i])
        calls = self._said[i].get("tool_calls")
        if calls:
            more = [self._said[i], self._anybody("tool", tool_call_id=calls[0].get("id", ""))]
        else:  # another answer, for what it thought may be left out later
            more = [self._anybody("assistant"), self._anybody("user", _QUESTION)]
        try:
            text = self._render([*self._served[:i], *more], generation_prompt=False)
        except ExampleError:
            return ""
        if calls:
            return text[len(begun) :] if text.startswith(begun) else ""
        return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""

    def _anybody(self, role: str, says: str = _ANSWER, **more: str) -> Message:
        return served_messages([{"role": role, "content": says, **more}], self._template)[0]

    def _answer_start(self, prompt: str, answered: str, i: int) -> int | None:
        """Where the answer begins in `answered`, whose beginning is not the prompt; None if that cannot be told.

        Some templates (Mistral 7B Instruct v0.3) render the system prompt only while the question is the last
        message. All that both texts must share is then the last message before the answer, up to where it begins.
        It is looked for in front of an answer that cannot contain it, because the real one may quote the question.
        """
        text = str(self.messages[i - 1].get("content") or "").strip()
        before = prompt.rfind(text)
        if not text or before < 0:
            return None
        shared = prompt[before:]
        probe = self._rendered(i, self._anybody("assistant"))
        end = probe.rfind(shared) + len(shared)
        return end if end >= len(shared) and answered[:end] == probe[:end] else None


@functools.lru_cache(maxsize=8)
def _wants_parts(template: str) -> bool:
    """Does the template go through `content`, or that of a message, part by part? Then the server gives it parts,
    whether it would take plain text as well or not."""
    from jinja2 import nodes  # these take a while to import
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def is_content(node: Any) -> bool:
        while isinstance(node, nodes.Filter | nodes.Test):
            node = node.node
        if isinstance(node, nodes.Name):
            return node.name == "content"
        if isinstance(node, nodes.Getattr):
            return node.attr == "content" and isinstance(node.node, nodes.Name)
        is_key = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const)
        return is_key and node.arg.value == "content" and isinstance(node.node, nodes.Name)

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except Exception:  # which rendering will say
        return False
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _with_object_arguments(call: Mapping[str, Any], own_order: bool) -> dict[str, Any]:
    function = {**call["function"], "arguments": arguments_of(call)}
    if own_order:
        return {**call, "function": function}
    served = {key: call[key] for key in ("id",) if key in call}
    named = {key: function[key] for key in ("arguments", "name")}
    return {**served, "function": named, "type": call.get("type", "function")}
