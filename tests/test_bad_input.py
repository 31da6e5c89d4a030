"""The promise about bad input: set aside with file, line, byte offset, field and reason; good neighbours train."""

import json
import threading
import time
from pathlib import Path

import pytest

from hogwild.config import load
from hogwild.curriculum import Curriculum
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.spool import Spool
from hogwild.weights import load_arena
from tiny import SIZES, llama, tokenizer

LONGEST_LINE = 1024 * 1024
MAX_TOKENS = 40
assert SIZES["max_position_embeddings"] == 64


def words(count: int) -> str:
    return " ".join(f"w{i % 60}" for i in range(count))


CHAT = '{"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hi"}]}'
BAD = {
    # what: (line, field, words of the reason)
    "broken JSON": (b'{"text": "w1"', None, "not JSON"),
    "a bare number": (b"12", None, "bare number"),
    "the wrong type": (b'{"text": 12}', "text", "must be a string, not the number 12"),
    "the wrong type of an option": (b'{"text": "w1", "passes": "many"}', "passes", "must be a whole number"),
    "an unknown field": (b'{"text": "w1", "prioritty": 1}', "prioritty", "did you mean `priority`?"),
    "NaN": (b'{"text": "w1", "weight": NaN}', None, "NaN is not JSON"),
    "an infinite number": (b'{"text": "w1", "weight": 1e999}', None, "larger than any number"),
    "an empty object": (b"{}", None, 'needs "messages"'),
    "an empty text": (b'{"text": " "}', "text", "is empty"),
    "a line of 100 MB": (b'{"text": "' + b"x" * 100_000_000 + b'"}', None, "longer than spool.max_line_bytes"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', None, "not UTF-8: byte 0xff at position 10"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', None, "surrogate"),
    "the wrong order of roles": (CHAT.encode(), "messages[0].role", "assistant cannot come first"),
    "a last turn that is not the assistant's": (
        b'{"messages": [{"role": "user", "content": "hi"}]}', "messages", "ends with user",
    ),
    # These are seen only by who has the model: at training.
    "longer than training.max_tokens": (
        json.dumps({"prompt": words(50), "completion": "w1"}).encode(),
        None, "51 tokens, and training.max_tokens is 40",
    ),
    "nothing to train on": (b'{"text": "w1"}', None, "no token to train on"),
    "a chat, and the model has no template": (
        b'{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}',
        "messages", "no chat template",
    ),
}  # fmt: skip


class Trained:
    """Spool, ledger and real trainer threads on a tiny model, without a server."""

    def __init__(self, tmp_path: Path, **training) -> None:
        folder = llama(tmp_path / "model")
        tokenizer(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["eos_token"]  # then a text of one token has nothing that could be predicted
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config = load(
            None,
            {
                "state_dir": str(tmp_path / "state"),
                "spool": {"settle_s": 0, "rescan_interval_s": 0.1, "max_line_bytes": LONGEST_LINE},
                "training": {"passes": 1, **training},
            },
        )
        self.ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
        curriculum = Curriculum(self.ledger)
        self.spool = Spool(config.spool, self.ledger, passes=1, on_accepted=lambda _: curriculum.wake())
        self.spool.prepare()
        self._learner = Learner(load_arena(folder), folder, config, self.ledger, curriculum)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.spool.run, args=(self._stop,))

    def __enter__(self) -> "Trained":
        self._learner.start()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self.spool.wake()
        self._thread.join(60)
        assert self._learner.stop(60)
        assert self._learner.failure is None
        self.ledger.close()

    def wait(self, files: int) -> None:
        """Until everything that can be trained is, and all errors are written down."""
        deadline = time.monotonic() + 120
        while not (
            self.ledger.counts().files == files
            and self.ledger.is_idle()
            and not self.ledger.errors_due()
            and not self.ledger.unmoved()
        ):
            assert self._learner.failure is None, self._learner.failure
            assert time.monotonic() < deadline
            time.sleep(0.05)


def errors_of(spool: Spool, name: str) -> list[dict]:
    return [json.loads(line) for line in (spool.failed / f"{name}.errors.jsonl").read_text().splitlines()]


def test_every_kind_of_bad_input_is_set_aside_and_its_neighbours_train(tmp_path):
    """One file with all of it, a good line before and after each."""
    content, expected, good = b"", [], 0
    for line_no, (what, (line, field, reason)) in enumerate(BAD.items()):
        good += 1
        content += b'{"text": "w1 w2 w3", "id": %d}\n' % good
        expected.append((2 * line_no + 2, len(content), field, reason, what))
        content += line + b"\n"
    good += 1
    content += b'{"text": "w1 w2 w3", "id": %d}\n' % good
    with Trained(tmp_path, max_tokens=MAX_TOKENS) as trained:
        fresh = trained.spool.incoming / ".mixed.jsonl.tmp"
        fresh.write_bytes(content)
        fresh.rename(trained.spool.incoming / "mixed.jsonl")
        trained.wait(files=1)
        counts = trained.ledger.counts()
        assert counts.trained == good
        assert counts.failed + counts.rejected == len(BAD)
        found = errors_of(trained.spool, "mixed.jsonl")
        assert (trained.spool.done / "mixed.jsonl").stat().st_size == len(content)
    by_line = {error["line"]: error for error in found}
    assert len(by_line) == len(found) == len(BAD)  # one reason each
    for line_no, offset, field, reason, what in expected:
        error = by_line[line_no]
        assert reason in error["reason"], what
        assert (error["file"], error["offset"], error["field"]) == ("mixed.jsonl", offset, field), what
        assert content[offset:].startswith(error["excerpt"].encode()[:8]) or "UTF-8" in what
        assert len(error["excerpt"]) <= 200
    assert not list(trained.spool.failed.glob(".*"))


def test_an_example_that_the_model_cannot_hold_is_set_aside_whatever_the_configuration_allows(tmp_path):
    with Trained(tmp_path, max_tokens=4096) as trained:
        (trained.spool.incoming / "long.jsonl").write_text(
            json.dumps({"prompt": words(200), "completion": "w1"})
            + "\n"
            + json.dumps({"text": words(20)})
            + "\n"
        )
        trained.wait(files=1)
        assert trained.ledger.counts().trained == 1
        (error,) = errors_of(trained.spool, "long.jsonl")
    assert error["line"] == 1
    assert error["reason"] == "201 tokens, and the model's context is 64"


def test_errors_that_a_crash_kept_from_being_written_are_written_by_the_next_start(tmp_path):
    state = tmp_path / "state"
    config = load(None, {"state_dir": str(state), "spool": {"settle_s": 0}})
    for life in range(2):
        with Ledger(state / "ledger.sqlite") as ledger:
            spool = Spool(config.spool, ledger, passes=1)
            spool.prepare()
            if life == 0:
                (spool.incoming / "a.jsonl").write_text('{"text": "a"}\nbad\n{"text": "c"}\n')
                spool.scan_once()
                assert [error["line"] for error in errors_of(spool, "a.jsonl")] == [2]
                ledger.set_failed(2, "too long", "text")
                assert [error["line"] for error in errors_of(spool, "a.jsonl")] == [2]
            else:
                stop = threading.Event()
                thread = threading.Thread(target=spool.run, args=(stop,))
                thread.start()
                deadline = time.monotonic() + 60
                while ledger.errors_due():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                stop.set()
                spool.wake()
                thread.join(60)
                assert errors_of(spool, "a.jsonl")[1] == {
                    "file": "a.jsonl",
                    "line": 3,
                    "offset": 18,
                    "field": "text",
                    "reason": "too long",
                    "excerpt": '{"text": "c"}',
                }


@pytest.mark.parametrize("what", BAD)
def test_a_file_of_nothing_but_bad_input_is_refused_at_once_or_fails_in_training(tmp_path, what):
    """Alone, without a neighbour: nothing hangs, and the file is where the user looks for it."""
    line, _, reason = BAD[what]
    config = load(
        None, {"state_dir": str(tmp_path), "spool": {"settle_s": 0, "max_line_bytes": LONGEST_LINE}}
    )
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spool = Spool(config.spool, ledger, passes=1)
        spool.prepare()
        (spool.incoming / "bad.jsonl").write_bytes(line + b"\n")
        scan = spool.scan_once()
        at_training = what in list(BAD)[-3:]
        assert (scan.accepted if at_training else scan.rejected) == ["bad.jsonl"]
        if not at_training:
            (error,) = errors_of(spool, "bad.jsonl")
            assert reason in error["reason"]
            assert (spool.failed / "bad.jsonl").exists()
