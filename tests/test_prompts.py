"""Chats are trained behind the prompts that the server makes of them; where they are not, somebody is told."""

import json
from pathlib import Path

import pytest

from hogwild.chat_settings import MODELS_OWN, ChatSettings
from hogwild.encoding import prompt
from support import Daemon, Server, wait_until
from tiny import chat_model, chat_tokenizer

OTHER = (
    "{% for message in messages %}{{ message['role'] == 'user' and 'w1 ' or 'w2 ' }}"
    "{{ message['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w3 {{ mood }} w2 {% endif %}"
)
QUIET = {"replay__self_texts": 0, "probes__own": 0, "checkpoint__interval_s": 0}


@pytest.mark.vllm
def test_a_template_that_the_server_alone_has_is_trained_behind(tmp_path):
    """And settings for it; until a server takes its place that has none."""
    model = chat_model(tmp_path / "model")
    template = tmp_path / "other.jinja"
    template.write_text(OTHER)
    more = ("--chat-template", str(template), "--default-chat-template-kwargs", json.dumps({"mood": "w7"}))
    server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock", more=more).wait_ready()
    daemon = Daemon(tmp_path / "daemon", tmp_path / "arena.sock", **QUIET)
    try:
        daemon.wait_for("training.started")
        assert "chat" not in daemon.wait_for("server.attached"), "a template is pages long"
        server.kill()
        server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock").wait_ready()
        daemon.wait_for("prompts.changed")
        wait_until(lambda: len(daemon.events("server.verified")) == 2, "the new server is compared")
        wait_until(lambda: not daemon.ask("status")["warnings"], "nothing to warn of")
        assert not daemon.events("prompts.differ")
    finally:
        for process in (daemon, server):
            process.kill()


@pytest.mark.vllm
def test_prompts_that_cannot_be_followed_are_told(tmp_path):
    model, elsewhere = chat_model(tmp_path / "model"), tmp_path / "elsewhere"
    chat_tokenizer(elsewhere)
    settings = json.loads((elsewhere / "tokenizer_config.json").read_text())
    (elsewhere / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": OTHER}))
    more = ("--tokenizer", str(elsewhere))
    server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock", more=more).wait_ready()
    daemon = Daemon(tmp_path / "daemon", tmp_path / "arena.sock", **QUIET)
    try:
        assert "--tokenizer is known to the server alone" in server.log.read_text()
        told = daemon.wait_for("prompts.differ")
        assert told["served"].endswith("w3 w2")
        assert told["trained"].endswith("</s> w2")
        warnings = wait_until(lambda: daemon.ask("status").get("warnings"), "a warning")
        assert any("other prompts of chats" in one and str(model) in one for one in warnings)
        daemon.wait_for("training.started")  # what is no chat is learned as well as ever
        # A server without it takes its place.
        server.kill()
        server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock").wait_ready()
        wait_until(lambda: len(daemon.events("server.verified")) == 2, "the new server is compared")
        wait_until(lambda: not daemon.ask("status")["warnings"], "nothing to warn of")
        assert len(daemon.events("prompts.differ")) == 1
    finally:
        for process in (daemon, server):
            process.kill()


def served_prompt(folder: Path, chat: ChatSettings) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer.decode(prompt([{"role": "user", "content": "w9"}], chat.on(tokenizer)))
    assert tokenizer.chat_template != chat.template, "the model's own stays as it is"
    return str(said)


@pytest.mark.parametrize(
    "settings",
    [
        ["--default-chat-template-kwargs", '{"mood": "w7"}'],
        ['--default-chat-template-kwargs={"mood": "w7"}'],
        ["--default_chat_template_kwargs.mood", "w7"],
        ["--default-chat-template-kwargs.mood=w7"],
    ],
)
def test_settings_are_read_as_vllm_reads_them(tmp_path, settings):
    chat_tokenizer(tmp_path)
    (tmp_path / "other.jinja").write_text(OTHER)
    for template in (OTHER, str(tmp_path / "other.jinja")):
        chat = ChatSettings.of_arguments(["--max-model-len", "64", "--chat-template", template, *settings])
        assert served_prompt(tmp_path, chat) == "w1 w9 </s> w3 w7 w2"


def test_without_any_the_model_s_own_template_is_taken(tmp_path):
    chat_tokenizer(tmp_path)
    assert ChatSettings.of_arguments(["--port", "8001"]) == MODELS_OWN
    assert served_prompt(tmp_path, MODELS_OWN) == "w1 w9 </s> w2"


def test_a_request_counts_for_more_than_what_the_server_was_told(tmp_path):
    """As with vLLM; and nothing that it is told takes the place of the messages."""
    chat_tokenizer(tmp_path)
    odd = {"add_generation_prompt": False, "tokenize": True, "conversation": [], "chat_template": "{{ 1 }}"}
    assert served_prompt(tmp_path, ChatSettings(None, odd)) == "w1 w9 </s> w2"


@pytest.mark.parametrize("said", [None, 7, {}, {"template": 7, "settings": []}, {"settings": None}])
def test_a_server_that_does_not_say_makes_the_models_own_prompts(said):
    assert ChatSettings.from_json(said) == MODELS_OWN
