"""Chats are trained behind the prompts that the server makes of them; where they are not, somebody is told."""

import pytest

from support import Daemon, Server, wait_until
from tiny import chat_model

pytestmark = pytest.mark.vllm

OTHER = (
    "{% for message in messages %}{{ message['role'] == 'user' and 'w1 ' or 'w2 ' }}"
    "{{ message['content'] }} </s> {% endfor %}{% if add_generation_prompt %}w3 w2 {% endif %}"
)


def test_a_template_that_the_server_alone_has_is_told(tmp_path):
    model = chat_model(tmp_path / "model")
    template = tmp_path / "other.jinja"
    template.write_text(OTHER)
    more = ("--chat-template", str(template))
    server = Server(model, tmp_path / "server.log", tmp_path / "arena.sock", more=more).wait_ready()
    daemon = Daemon(
        tmp_path / "daemon", tmp_path / "arena.sock", replay__self_texts=0, probes__own=0, checkpoint__interval_s=0
    )  # fmt: skip
    try:
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
