"""Chat templates of several model families, each with a small real tokenizer that has the family's special tokens.

Llama and Qwen models tokenise bytes, Mistral and Gemma models pieces with a mark for white space: both kinds are here.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hogwild import demo_model

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "data" / "templates"
Message = dict[str, Any]
LINES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """What a family's template makes of an assistant's message that is the last one.

    Attributes:
        end: the text of its end-of-turn token.
        says: the text of a message, as the model has to produce it after the generation prompt, without the end.
        stops: at which a server ends an answer, where the template alone does not tell.
    """

    name: str
    end: str
    says: Callable[[Message], str]
    systems: bool = True
    tools: bool = False
    parallel_calls: bool = False
    reasoning: bool = False
    stops: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.name)


def content(message: Message) -> str:
    return message.get("content") or ""


def tool_calls(message: Message) -> list[Message]:
    return message.get("tool_calls", [])


def tojson(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def llama_says(message: Message) -> str:
    for call in tool_calls(message):
        function = call["function"]
        return f'{{"name": "{function["name"]}", "parameters": {tojson(function["arguments"])}}}'
    return content(message).strip()


def qwen_says(message: Message) -> str:
    text = content(message)
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{tojson(call['function']['arguments'])}}}\n</tool_call>"
        for call in tool_calls(message)
    ]
    thought = message.get("reasoning_content", "").strip("\n")
    text = text.lstrip("\n")
    return f"<think>\n{thought}\n</think>\n\n" + "\n".join([*([text] if content(message) else []), *calls])


def mistral_says(message: Message, space: str = " ") -> str:
    if not tool_calls(message):
        return space + content(message)
    calls = [tojson(call["function"])[:-1] + f', "id": "{call["id"]}"}}' for call in tool_calls(message)]
    return f"[TOOL_CALLS] [{', '.join(calls)}]"


def thinking_says(message: Message) -> str:
    thought = message.get("reasoning_content", "").strip("\n")
    return f"{thought}\n</think>\n\n" + content(message).lstrip("\n")


def r1_says(message: Message) -> str:
    return f"{message.get('reasoning_content', '').strip(chr(10))}\n</think>\n\n{content(message)}"


def nemotron_says(message: Message) -> str:
    return f"{message.get('reasoning_content', '').strip(chr(10))}\n</think>\n\n{content(message).strip()}\n"


def glm47_says(message: Message) -> str:
    return f"{message.get('reasoning_content', '').strip()}</think>{content(message).strip()}"


FAMILIES = [
    Family("chatml", "<|im_end|>", content),
    Family("llama3", "<|eot_id|>", llama_says, tools=True),
    Family("qwen3", "<|im_end|>", qwen_says, tools=True, parallel_calls=True, reasoning=True),
    Family("qwen3-thinking", "<|im_end|>", thinking_says, reasoning=True),
    Family("mistral", "</s>", mistral_says, tools=True, parallel_calls=True),
    Family(
        "mistral-small",
        "</s>",
        functools.partial(mistral_says, space=""),
        tools=True,
        parallel_calls=True,
    ),
    Family("gemma2", "<end_of_turn>", lambda message: content(message).strip(), systems=False),
    Family("gemma3", "<end_of_turn>", lambda message: content(message).strip()),
    Family("phi3", "<|end|>", content, stops=("<|endoftext|>", "<|assistant|>", "<|end|>")),
    Family("glm4", "<|user|>", content, stops=("<|endoftext|>", "<|user|>", "<|observation|>")),
    Family(
        "gemma4",
        "<turn|>",
        lambda message: content(message).strip(),
        stops=("<turn|>", "<|tool_response>", "<eos>"),
    ),
    Family(
        "glm4.7",
        "<|user|>",
        glm47_says,
        reasoning=True,
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    Family("nemotron2", "<SPECIAL_12>", nemotron_says, reasoning=True, stops=("<SPECIAL_12>",)),
    Family("deepseek-r1", "<｜end▁of▁sentence｜>", r1_says, reasoning=True),
]


@functools.cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a family, with its template."""
    if not name.startswith(("mistral", "gemma")):
        result = AutoTokenizer.from_pretrained(demo_model.build(REPOSITORY / ".demo" / "model"))
        if name != "chatml":  # Llama 3 and Qwen split at the end of a line, not before its last newline
            result.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LINES), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        if name == "llama3":
            headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
            result.add_special_tokens({"additional_special_tokens": headers})
            result.bos_token, result.eos_token = headers[0], headers[3]
        elif name == "deepseek-r1":
            marks = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
            result.add_special_tokens({"additional_special_tokens": marks})
            result.bos_token, result.eos_token = marks[0], marks[3]
            result.add_tokens(["<think>", "</think>"])
        elif name == "nemotron2":
            result.add_special_tokens({"additional_special_tokens": ["<SPECIAL_10>", "<SPECIAL_12>"]})
            result.add_tokens(["<think>", "</think>"])
            result.eos_token = "<SPECIAL_12>"
        elif name in ("phi3", "glm4", "glm4.7"):
            marks = ["<|system|>", "<|user|>", "<|assistant|>"]
            marks += ["<|end|>"] if name == "phi3" else ["[gMASK]", "<sop>", "<|observation|>"]
            result.add_special_tokens({"additional_special_tokens": marks})
            result.eos_token = "<|endoftext|>"
            result.add_tokens(
                ["<think>", "</think>", "<tool_call>", "</tool_call>"] if name == "glm4.7" else []
            )
        else:  # as Qwen3 has them: tokens of their own, but not special
            result.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
            result.add_tokens(["<tool_response>", "</tool_response>"])
    elif name.startswith("mistral"):
        marks = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
        marks += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
        result = _pieces(["<unk>", "<s>", "</s>"], marks, prefix_space=True)
    else:
        marks = ["<start_of_turn>", "<end_of_turn>"]
        if name == "gemma4":
            marks = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"]
            marks += ["<|tool_response>", "<tool_response|>"]
        result = _pieces(["<unk>", "<bos>", "<eos>"], marks, prefix_space=False)
    result.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return result


def _pieces(special: Sequence[str], marks: Sequence[str], prefix_space: bool) -> Any:
    """Byte-pair encoding over pieces with "▁" for a space, and bytes for what it does not know: as SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # A piece never goes on over the end of a line, as in the vocabularies of these families.
    lines = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    words = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    corpus = [path.read_text() for path in [*sorted(REPOSITORY.glob("docs/*.md")), REPOSITORY / "README.md"]]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    # The bytes are ordinary tokens, of which only the model makes use.
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(merge) for merge in _merges(tokenizer)]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tail = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tail.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(tail)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    )


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges
