"""Which of the learned examples are mixed into a step, so that learning the new does not undo the old.

Candidates come from three draws in turn: any learned example; any file, then an example of it; and one learned
lately. Among them the choice falls by weight: what was harder when last measured counts more, and what shares a file
or a tag with the step's other examples, or with those replayed just before, counts less. Every draw follows from the
seed, the number of the step and the ledger, so a restart changes nothing.
"""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from hogwild.ledger_records import Pending
from hogwild.ledger_replay import Candidate, Pool
from hogwild.settings import ReplayConfig

if TYPE_CHECKING:  # torch takes seconds to import, and the intake does without
    from hogwild.selfreplay import Sample

RECENT = 8  # replay passes before this step that count for diversity
ALIKE = 0.5  # factor for each example of the same file, and for each of the same tags, among those
EASIEST, HARDEST = 0.05, 2.0  # nats; beyond these a loss says noise, or not learnable, rather than harder


class Replay:
    """Chooses what is mixed into each step.

    Args:
        seed: with the step's number, all that the draws depend on besides the ledger.
        own: texts sampled from the model itself before training.
    """

    def __init__(self, pool: Pool, config: ReplayConfig, seed: int) -> None:
        self._pool, self._config, self._seed = pool, config, seed
        self.own: Sequence[Sample] = ()

    def due(self, step: int, new: int) -> int:
        """How many are replayed in this step, next to `new` new examples; fractions even out over the steps."""
        ratio = self._config.ratio * max(new, 1)
        return int((step + 1) * ratio) - int(step * ratio)

    def choose(
        self, step: int, beside: Sequence[Pending], count: int
    ) -> "tuple[list[Pending], list[Sample]]":
        """`count` examples for step number `step`: learned ones, and texts of the model's own.

        Args:
            beside: the step's new examples.
        """
        if count <= 0:
            return [], []
        rng = Random(f"{self._seed} {step}")
        bounds = self._pool.bounds()
        share = self._config.self_share if bounds else 1.0
        own = sum(rng.random() < share for _ in range(count)) if self.own else 0
        samples = rng.sample(list(self.own), min(own, len(self.own)))
        if bounds is None or own >= count:
            return [], samples
        near = [self._pool.candidate(item.example_id) for item in beside]
        near += map(self._pool.candidate, self._pool.recently_replayed(RECENT))
        chosen: list[Candidate] = []
        for _ in range(count - own):
            found = self._draw(rng, *bounds)
            for taken in chosen:
                found.pop(taken.example_id, None)
            if found:
                weights = [self._weight(one, [*near, *chosen]) for one in found.values()]
                chosen += rng.choices(list(found.values()), weights)
        return self._pool.get([one.example_id for one in chosen]), samples

    def _draw(self, rng: Random, low: int, high: int) -> dict[int, Candidate]:
        found: dict[int, Candidate] = {}
        for i in range(self._config.candidates):
            if i % 3 == 0:
                example_id = self._pool.of_all(rng, low, high)
            elif i % 3 == 1:
                example_id = self._pool.of_files(rng)
            else:
                age = int(rng.expovariate(0.693 / self._config.recency_half_life))
                example_id = self._pool.of_all(rng, max(low, high - age), high)
            if example_id is not None and example_id not in found:
                found[example_id] = self._pool.candidate(example_id)
        return found

    def _weight(self, one: Candidate, near: Sequence[Candidate]) -> float:
        alike = 0
        for other in near:
            alike += one.file_id == other.file_id
            alike += bool(one.tags & other.tags)
            alike += 2 * (one.example_id == other.example_id)  # the very same, a moment ago
        hardness = min(max(one.loss, EASIEST), HARDEST)
        return float(hardness**self._config.difficulty * ALIKE**alike)
