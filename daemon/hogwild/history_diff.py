"""How far the weights moved between two generations, read tensor by tensor."""

import torch

from hogwild.errors import CheckpointError
from hogwild.history import History
from hogwild.history_read import BrokenLinkError
from hogwild.tensor_file import TORCH_DTYPES


def changes(history: History, older: int, newer: int) -> dict[str, tuple[float, float, int]]:
    """Weight -> (squared norm of the difference, squared norm of the older one, elements that differ).

    Raises:
        CheckpointError: one of the two cannot be restored, or they are not of the same model.
    """
    while True:
        try:
            return _changes(history, older, newer)
        except BrokenLinkError as error:
            history.note(error.part, error)


def _changes(history: History, older: int, newer: int) -> dict[str, tuple[float, float, int]]:
    found = {}
    with history.reader(older) as a, history.reader(newer) as b:
        names = [name for name in a.names() if "/" not in name]  # moments have a slash
        strangers = set(names) ^ {name for name in b.names() if "/" not in name}
        if strangers:
            raise CheckpointError(
                f"generations {older} and {newer} are not of one model: only one has {sorted(strangers)[0]}"
            )
        for name in names:
            before, after = (
                torch.from_numpy(one.read(name)).view(TORCH_DTYPES[one.kind(name)[0]]) for one in (a, b)
            )
            if before.dtype == after.dtype and torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
                found[name] = (0.0, float(before.double().square().sum()), 0)
                continue
            old, new = before.double(), after.double()
            found[name] = (
                float((new - old).square().sum()), float(old.square().sum()), int((new != old).sum())
            )  # fmt: skip
    return found
