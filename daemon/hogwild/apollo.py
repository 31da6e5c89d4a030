"""The optimizer state of the whole model: one state a weight, shared by all trainer threads without locks."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from hogwild.errors import CheckpointError
from hogwild.settings import OptimizerConfig
from hogwild.streams import settle
from hogwild_kernels import (
    AdamConfig,
    AdamState,
    ApolloConfig,
    ApolloState,
    UpdateResult,
    adam_update,
    apollo_update,
    embedding_update,
)


class Optimizer:
    """APOLLO for linear weights and embeddings, Adam for the small rest.

    States are made when a weight is first updated or loaded. The dictionary is the only thing that threads share under
    a rule: `dict.setdefault` is atomic, so two threads that meet a weight for the first time end up with one state.
    """

    def __init__(self, config: OptimizerConfig, seed: int, device: torch.device | str = "cpu") -> None:
        """`device`: of the weights; the state is kept beside them."""
        self.config, self.seed, self._device = config, seed, torch.device(device)
        self.apollo_config = ApolloConfig(
            rank=config.rank,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            gap=config.gap,
            gamma=config.gamma,
            rounding=config.rounding,
            seed=seed,
        )
        self.tensor_config = replace(self.apollo_config, scaling="tensor")
        self.adam_config = AdamConfig(
            lr=config.lr, betas=config.betas, eps=config.eps, rounding=config.rounding, seed=seed
        )
        self._states: dict[str, ApolloState | AdamState] = {}

    def __len__(self) -> int:
        """Weights that have moments."""
        return len(self._states)

    def update_linear(
        self,
        name: str,
        weight: torch.Tensor,  # (m, n), updated in place
        x: torch.Tensor,  # (T, n) layer input
        d: torch.Tensor,  # (T, m) gradient of the layer's output
        seed: int,
        *,
        one_scale: bool = False,
    ) -> UpdateResult:
        """One APOLLO step; `seed` varies the rounding between threads.

        Args:
            one_scale: for the whole weight, in place of one a column: what is orthogonal to a direction of x stays so.
                (Scales per row, where m >= n, do no harm.)
        """
        state = self._matrix(name, weight)
        by_tensor = one_scale and weight.shape[0] < weight.shape[1]
        return apollo_update(weight, x, d, state, self.tensor_config if by_tensor else None, seed=seed)

    def update_embedding(
        self,
        name: str,
        weight: torch.Tensor,  # (V, n), updated in place
        tokens: torch.Tensor,  # (S,) int64, repeats allowed
        rows: torch.Tensor,  # (S, n) gradient of the row that each of them looked up
        seed: int,
    ) -> UpdateResult:
        """One APOLLO step of an embedding: of the rows of these tokens, and of no other."""
        return embedding_update(weight, tokens, rows, self._matrix(name, weight), seed=seed)

    def _matrix(self, name: str, weight: torch.Tensor) -> ApolloState:
        state = self._states.get(name)
        if state is None:
            shape = weight.shape[0], weight.shape[1]
            state = self._share(name, ApolloState(name, shape, self.apollo_config, self._device))
        assert isinstance(state, ApolloState)
        return state

    def update_small(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor, seed: int
    ) -> UpdateResult:
        """One Adam step of a norm, a bias or a 3-D convolution weight."""
        state = self._states.get(name)
        if state is None:
            shape = tuple(weight.shape)
            state = self._share(name, AdamState(name, shape, self.adam_config, self._device))
        assert isinstance(state, AdamState)
        return adam_update(weight, gradient, state, seed=seed)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state as named tensors, for safetensors."""
        return {
            f"{name}/{key}": tensor
            for name, state in sorted(self._states.items())
            for key, tensor in state.tensors().items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Replace all state by saved state; `shapes` has every trainable weight's. That of other weights is left out.

        Raises:
            CheckpointError: it was saved with other settings, naming every weight; nothing has been taken over.
        """
        grouped: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, leaf = key.rpartition("/")
            grouped.setdefault(name, {})[leaf] = tensor
        states, problems = {}, []
        for name, parts in grouped.items():
            shape = shapes.get(name)
            if shape is None:
                continue
            state: ApolloState | AdamState
            if len(shape) == 2:
                state = ApolloState(name, (shape[0], shape[1]), self.apollo_config, self._device)
            else:
                state = AdamState(name, shape, self.adam_config, self._device)
            try:
                state.load(parts)
            except ValueError as error:
                problems.append(str(error))
            states[name] = state
        if problems:
            heading = (
                f"the checkpoint's optimizer state does not fit ({len(problems)} found); was it saved with another "
                f"optimizer.rank than {self.config.rank}? Set it back, or move the checkpoint away"
            )
            raise CheckpointError("\n  - ".join([f"{heading}:", *problems]))
        settle(self._device)
        self._states = states

    def _share(self, name: str, state: ApolloState | AdamState) -> ApolloState | AdamState:
        """Show a new state to all threads, once it is all zeros; theirs, if one was quicker."""
        settle(self._device)
        return self._states.setdefault(name, state)
