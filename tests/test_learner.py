"""What a learner refuses before it has a thread."""

from dataclasses import replace
from pathlib import Path

import pytest

from hogwild.arena.client import Arena
from hogwild.config import load
from hogwild.curriculum import Curriculum
from hogwild.errors import VerificationError
from hogwild.learner import Learner
from hogwild.ledger import Ledger
from hogwild.weights import load_arena
from tiny import llama, tokenizer


def test_a_server_whose_linear_layers_are_all_packed_is_refused(tmp_path: Path) -> None:
    """Norms alone could be trained; nobody who drops a file means that."""
    folder = llama(tmp_path / "model")
    tokenizer(folder)
    whole = load_arena(folder)
    packed = {name: "packed" for name in whole.layout.tensors if name.endswith("_proj.weight")}
    assert packed
    left = {name: region for name, region in whole.layout.tensors.items() if name not in packed}
    arena = Arena(whole.weights, whole.control, replace(whole.layout, tensors=left, frozen=packed))
    config = load(None, {"state_dir": str(tmp_path / "state")})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(VerificationError, match="nothing to train") as caught:
            Learner(arena, folder, config, ledger, Curriculum(ledger))
        assert set(packed) <= {problem.split(":")[0] for problem in caught.value.problems}
        assert Learner(whole, folder, config, ledger, Curriculum(ledger)).frozen
