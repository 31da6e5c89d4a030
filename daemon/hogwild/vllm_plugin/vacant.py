"""vLLM's parameters take no memory while its model is built on a GPU: their place is in the arena.

vLLM makes every parameter with memory behind it, all of the weights' size, before a loader is given the model. Beside
an arena, which a server that is started again finds on the GPU already, there is no room for that. So the memory of a
module's parameters is given back as soon as the module is finished and put into another one; shapes, strides and shared
storages stay, which is all that place.py looks at. An operator that is given one of them after all (to
initialise it, or by vLLM when it notes what all of them look like) finds memory there while it runs, of undefined
content: what a parameter holds before it is loaded counts for nothing.

On a CPU none of it is needed: pages that nobody writes to are not there. Imports no vllm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SMALL = 1 << 20  # bytes: what is smaller keeps its memory, and its content, which somebody may look at


class Vacancies(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Storages whose memory has been given back. While active, each operator has those that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._vacant: dict[int, tuple[torch.UntypedStorage, int]] = {}  # by its identity: it, and its bytes

    def nbytes(self, storage: torch.UntypedStorage) -> int:
        """What a storage has, or had before it was vacated."""
        kept = self._vacant.get(storage._cdata)
        return storage.nbytes() if kept is None else kept[1]

    def vacate(self, module: torch.nn.Module) -> None:
        """Give back the memory of all large parameters of `module`."""
        for parameter in module.parameters():
            storage = parameter.untyped_storage()
            size = storage.nbytes()
            large = parameter.device.type != "meta" and size >= _SMALL
            if large and parameter.is_floating_point() and storage.resizable():
                self._vacant[storage._cdata] = storage, size
                storage.resize_(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Also for a view: a part of nothing is out of bounds. On a GPU, what is freed here is used again in the order
        # of the stream, so the operator need not have ended.
        lent = [one for leaf in tree_leaves((args, kwargs)) if (one := self._vacancy(leaf)) is not None]
        for storage, size in lent:
            storage.resize_(size)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            for storage, _ in lent:
                storage.resize_(0)

    def _vacancy(self, leaf: Any) -> tuple[torch.UntypedStorage, int] | None:
        if not isinstance(leaf, torch.Tensor):
            return None
        try:
            return self._vacant.get(leaf.untyped_storage()._cdata)
        except NotImplementedError:
            return None  # a tensor of a kind that has no storage


@contextmanager
def building() -> Iterator[Vacancies]:
    """Around the construction of a model: each module is vacated when it is put into another one."""
    vacancies = Vacancies()

    def finished(_parent: torch.nn.Module, _name: str, module: torch.nn.Module | None) -> None:
        if module is not None:
            vacancies.vacate(module)

    hook = register_module_module_registration_hook(finished)
    try:
        with vacancies:
            yield vacancies
    finally:
        hook.remove()
