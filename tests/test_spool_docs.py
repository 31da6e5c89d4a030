"""docs/spool.md holds what it says: its lines are lines, its bounds are the code's, its commands work."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from hogwild import examples
from hogwild.errors import ExampleError
from hogwild.examples import FORMS, Example, parse_line
from hogwild.messages import MESSAGE_FIELDS

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "spool.md").read_text()
JSON = [line for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
COMMANDS = [block for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) if "hogwild" not in block]
CHAT = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_every_line_that_it_shows_is_one():
    shown = [json.loads(line) for line in JSON]
    lines = [line for line, value in zip(JSON, shown, strict=True) if "reason" not in value]
    assert len(lines) >= 7
    for line in lines:
        assert parse_line(line.encode())
    (error,) = (value for value in shown if "reason" in value)
    with pytest.raises(ExampleError) as caught:
        parse_line(error["excerpt"].encode())
    assert (caught.value.field, caught.value.reason) == (error["field"], error["reason"])


def test_every_field_and_bound_is_named():
    for name in {*MESSAGE_FIELDS, *(name for names in FORMS.values() for name in names)}:
        assert f"`{name}`" in TEXT or f'"{name}"' in TEXT, name
    weights = f"| `weight` | {examples.MIN_WEIGHT:g} to {examples.MAX_WEIGHT:g}, not 0 |"
    tags = f"up to {examples.MAX_TAGS} texts of up to {examples.MAX_TAG_CHARS} characters"
    passes, name = f"| `passes` | 1 to {examples.MAX_PASSES} |", f"up to {examples.MAX_ID_CHARS} characters"
    for said in (weights, tags, passes, name, f"-{examples.MAX_PRIORITY} to {examples.MAX_PRIORITY}"):
        assert said in TEXT, said


def sources(folder: Path) -> None:
    """What the commands read, as other tools write it."""
    weighted = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": 1}]
    lines = [{"messages": weighted, "tools": TOOLS, "parallel_tool_calls": False}, {"messages": CHAT}]
    (folder / "openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    talks = [
        {"id": 7, "conversations": [human, gpt, human]},
        {"conversations": [{"from": "system", "value": "s"}, human, gpt]},
        {"id": "x", "conversations": [human]},
    ]
    (folder / "sharegpt.json").write_text(json.dumps(talks))
    tasks = [{"instruction": "i", "input": more, "output": "o"} for more in ("", "n")]
    (folder / "alpaca.json").write_text(json.dumps([*tasks, {"instruction": "i", "output": "o"}]))
    (folder / "table.csv").write_text('question,answer\n"Who, then?",Ada\n')
    (folder / "notes").mkdir()
    (folder / "notes" / "1.txt").write_text("a\nb\n")
    (folder / "notes" / "2.txt").write_text("c")


def made(command: str, folder: Path) -> list[Example]:
    """What the last file that a block of commands writes holds, each line accepted."""
    subprocess.run(["bash", "-euc", command], cwd=folder, check=True)
    written = re.findall(r"> (\w+\.jsonl)", command)[-1]
    return [parse_line(line) for line in (folder / written).read_bytes().splitlines()]


@pytest.mark.jq
def test_the_commands_turn_other_formats_into_lines(tmp_path):
    sources(tmp_path)
    openai, sharegpt, alpaca, notes, table = (made(command, tmp_path) for command in COMMANDS)
    weighted = (CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1] | {"weight": 1})
    assert [(line.messages, line.tools) for line in openai] == [(weighted, tuple(TOOLS)), (CHAT, None)]
    assert [line.train_on for line in openai] == ["all", "all"]
    system = {"role": "system", "content": "s"}
    assert [(line.id, line.messages) for line in sharegpt] == [("7", CHAT), (None, (system, *CHAT))]
    asked = [line.messages[0]["content"] for line in alpaca if line.messages]
    assert asked == ["i", "i\n\nn", "i"]
    assert [(line.id, line.text) for line in notes] == [("notes/1.txt", "a\nb\n"), ("notes/2.txt", "c")]
    assert [(line.prompt, line.completion) for line in table] == [("Who, then?", " Ada")]


ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.jq
@pytest.mark.parametrize(
    ("form", "line", "asked"),
    [
        ("ShareGPT", {"id": "x", "conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, "q"),
        ("Alpaca", {"instruction": "i", "input": "n", "output": "a"}, "i\n\nn"),
        ("Alpaca", {"instruction": "i", "input": "", "output": "a", "text": None}, "i"),
        ("Alpaca", {"instruction": "i", "output": "a"}, "i"),
        ("Alpaca", {"instruction": "i", "output": "a", "text": "Below is an instruction. i"}, "i"),
        (
            "ShareGPT",
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "q",
        ),
        ("Dolly", {"instruction": "i", "context": "c", "response": "a", "category": "qa"}, "c\n\ni"),
        ("Dolly", {"instruction": "i", "context": "", "response": "a"}, "i"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
        ("preference", {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}, "q"),
        ("preference", {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, "q"),
        (
            "preference",
            {"prompt": "q", "messages": [], "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
            "q",
        ),
        ("conversational prompt-completion", {"prompt": [ASKED], "completion": [SAID]}, "q"),
    ],
)
@pytest.mark.parametrize(
    "written", [json.dumps, lambda line: json.dumps([line], indent=1)], ids=["lines", "array"]
)
def test_a_line_of_another_format_is_named_and_the_command_converts_it(tmp_path, form, line, asked, written):
    with pytest.raises(ExampleError) as caught:
        parse_line(json.dumps(line).encode())
    said = caught.value.reason
    assert said.startswith(f"this is a line in the {form} format")
    assert "; convert the file: jq " in said
    (tmp_path / "FILE").write_text(written(line) + "\n")
    (converted,) = made(said.partition("convert the file: ")[2], tmp_path)
    assert converted.messages is not None
    assert [turn["content"] for turn in converted.messages[-2:]] == [asked, "a"]


@pytest.mark.jq
@pytest.mark.parametrize("value", ["array", "object"])
def test_a_file_that_goes_over_lines_is_told_so_at_its_first(tmp_path, value):
    text = json.dumps([{"text": "a"}] if value == "array" else {"text": "a"}, indent=2)
    (tmp_path / "FILE").write_text(text)
    with pytest.raises(ExampleError, match=r"not JSON: .*FILE") as caught:
        parse_line(text.splitlines()[0].encode())
    command = "jq" + caught.value.reason.partition(": jq")[2]
    assert made(command, tmp_path) == [Example(text="a")]
    with pytest.raises(ExampleError, match=r"bare array.*jq -c"):
        parse_line(b'[{"text": "a"}]')
