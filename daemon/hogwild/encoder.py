"""From a line in the ledger to what a trainer takes, through the one tokenizer that all threads share."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hogwild import encoding, examples
from hogwild import log as logs
from hogwild.cautions import Warned, cautions
from hogwild.chat_settings import MODELS_OWN, ChatSettings
from hogwild.errors import ExampleError
from hogwild.examples import Example
from hogwild.groups import Group
from hogwild.ledger import Ledger, Pending
from hogwild.settings import TrainingConfig

log = logs.get(__name__)


class Encoder:
    """The tokenizer of the model in `folder`, with the settings of training.

    Attributes:
        freezes: can the model's context be frozen at all?
        tokenizer: with the server's chat template; to be used only while `lock` is held: a fast one is not safe to
            share while its settings change.
    """

    def __init__(
        self, folder: Path, settings: TrainingConfig, ledger: Ledger, chat: ChatSettings = MODELS_OWN
    ) -> None:
        self._own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._chat, self.tokenizer = chat, chat.on(self._own)
        self.lock = threading.Lock()
        self._settings, self._ledger, self.freezes = settings, ledger, True
        self._context_length = encoding.context_length(folder)
        self._stops = encoding.stop_texts(folder, self.tokenizer)
        self._warned = Warned()

    def follow(self, chat: ChatSettings) -> bool:
        """Make the prompts of a server that was told this of chats, from now on; False: it was so before."""
        with self.lock:
            if chat == self._chat:
                return False
            self._chat, self.tokenizer = chat, chat.on(self._own)
            return True

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of bare texts."""
        with self.lock:
            return [list(self.tokenizer(text)["input_ids"]) for text in texts]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """The token ids behind which an answer to these messages is trained; None where the chat template takes no
        such chat, or there is none."""
        with self.lock:
            try:
                return encoding.prompt(messages, self.tokenizer)
            except ExampleError:
                return None

    def text(self, ids: Sequence[int]) -> str:
        """What these tokens say, special ones too."""
        with self.lock:
            return str(self.tokenizer.decode(list(ids)))

    def sequences(self, example: Example) -> list[encoding.Encoded]:
        """An example as token ids.

        Raises:
            ExampleError: it is too long, or the chat template does not allow it.
        """
        with self.lock:
            return examples.encode(
                example,
                self.tokenizer,
                max_tokens=self._settings.max_tokens,
                max_trained=self._settings.most_trained,
                context=self._settings.context,
                freezes=self.freezes,
                context_length=self._context_length,
                train_on=self._settings.train_on,
                stops=self._stops,
            )

    def group(self, example: Example) -> Group:
        """An example's sequences, as a trainer takes them; raises as `sequences`."""
        return Group.of(self.sequences(example), example.weight, example.context)

    def pending(self, pending: Pending, *, sets_aside: bool) -> Group | None:
        """Its tokens, or None for one that cannot be trained, which is then set aside in the ledger if it is new."""
        try:
            example = pending.example()  # a line that an older version accepted may be refused now
            group = self.group(example)
        except ExampleError as error:
            if sets_aside:
                self._ledger.set_failed(pending.example_id, error.reason, error.field)
                log.warning("example.failed", **pending.who, reason=error.reason, field=error.field)
            return None
        if sets_aside and pending.passes_done == 0:
            self._warn(pending, example)
        return group

    def _warn(self, pending: Pending, example: Example) -> None:
        """Say once a file what `hogwild check` says of each line."""
        with self.lock:
            found = cautions(example, self.tokenizer, self._settings.train_on)
        for caution in found:
            if self._warned.first(pending.file, caution.code):
                log.warning("example.caution", **pending.who, code=caution.code, reason=caution.text)
