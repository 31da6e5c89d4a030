"""vLLM's parameters take no memory while its model is built on a GPU: their place is in the arena.

vLLM makes every parameter with memory behind it, all of the weights' size, before a loader is given the model. Beside
an arena, which a server that is started again finds on the GPU already, there is no room for that. So the memory of a
module's parameters is given back as soon as the module is finished and put into another one; shapes, strides and shared
storages stay, which is all that place.py looks at. An operator that is given one of them after all, to initialise
it, finds memory there, of undefined content: what a parameter holds before it is loaded counts for nothing.

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
    """Storages whose memory has been given back. While active, an operator that is given one finds it refilled."""

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
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._refill(leaf)  # a view needs it too: a part of nothing is out of bounds
        return func(*args, **(kwargs or {}))

    def _refill(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            return  # a tensor of a kind that has none
        found = self._vacant.pop(storage._cdata, None)
        if found is not None:
            storage.resize_(found[1])


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
