"""Thoughts in a rendered chat: the marks that models write around what they think before they answer.

No template says which marks these are; vLLM's reasoning parsers name the same ones.
"""

import re
from typing import NamedTuple

_MARKS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, Nemotron, MiniMax, Kimi, Step, and most others
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Mistral
)


class Thought(NamedTuple):
    """The thought that a prompt ends with, and that the model goes on from."""

    before: str
    """The prompt up to it."""
    written: str
    begin: str
    end: str
    is_open: bool
    """The model is to think; otherwise it has thought nothing, and is to answer."""

    def said_in(self, content: str) -> tuple[str, str]:
        """(what was thought, what was answered) of a content that may hold both, as R1 and its kin write them; without
        its beginning only where that is in the prompt."""
        thought, end, answer = content.partition(self.end)
        if not end or not (self.is_open or thought.lstrip().startswith(self.begin)):
            return "", content
        return thought.lstrip().removeprefix(self.begin).strip("\n"), answer.lstrip("\n")

    def is_followed(self, answer: str, reasoning: str) -> bool:
        """Does `answer` go on from it, with what was thought?"""
        goes_on = self.end in answer and not answer.lstrip().startswith(self.begin)
        return not self.is_open or (goes_on and reasoning.strip() in answer)

    def followed_by(self, answer: str, reasoning: str) -> str:
        """What the model would have to write after it, of an answer without its thought; "" of one that has one."""
        # Some templates write in front of every answer that nothing was thought (DeepSeek V3.2).
        answer = re.sub(_nothing(self.begin, self.end), "", answer)
        if answer.lstrip().startswith(self.begin):
            return ""
        if not self.is_open:
            return answer
        line = "\n" if self.written.endswith("\n") else ""
        thought = reasoning.strip("\n")
        return f"{thought}{line}{self.end}{line * 2}{answer}"


def at_end(prompt: str) -> Thought | None:
    """The thought that `prompt` ends with, begun or already over; None: it ends otherwise."""
    for begin, end in _MARKS:
        found = re.search(rf"({re.escape(begin)}\s*)?{re.escape(end)}\s*\Z|{re.escape(begin)}\s*\Z", prompt)
        if found is not None:
            written = found.group()
            return Thought(prompt[: found.start()], written, begin, end, end not in written)
    return None


def is_empty(answer: str) -> bool:
    """Does an answer begin with a thought in which nothing was thought?"""
    return any(re.match(_nothing(*marks), answer) for marks in _MARKS)


def after(answer: str) -> str:
    """What follows the thoughts in an answer."""
    return answer[max(answer.rfind(end) + len(end) if end in answer else 0 for _, end in _MARKS) :]


def _nothing(begin: str, end: str) -> str:
    return rf"\A\s*({re.escape(begin)}\s*)?{re.escape(end)}\s*"
