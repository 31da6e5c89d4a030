"""Back to an older generation under the running daemon, because a person asks for it or because the probes have fallen.

What is done to weights, ledger and disk is `rollback.py`; the search for a generation that is good is `trips.py`. Here
is what the daemon does around them: no arena is taken meanwhile, a save under way is finished, whoever asked is
answered, and the next checkpoint counts from the generation that was gone back to.
"""

from hogwild import log as logs
from hogwild import metrics, rollback, trips
from hogwild.attachment import Attachment
from hogwild.checkpoint_schedule import CheckpointSchedule
from hogwild.commands import Command
from hogwild.errors import HogwildError
from hogwild.keeper import Keeper
from hogwild.learner import Learner
from hogwild.ledger import Ledger

log = logs.get(__name__)


class GoingBack:
    """One for the life of a daemon. Called by the supervisor's loop.

    Attributes:
        stuck: the probes have fallen, and no generation could be gone back to.
    """

    def __init__(
        self, ledger: Ledger, keeper: Keeper, schedule: CheckpointSchedule, attachment: Attachment
    ) -> None:
        self._ledger, self._keeper = ledger, keeper
        self._schedule, self._attachment = schedule, attachment
        self.stuck = False

    def on_trip(self, learner: Learner, *, go_on: bool) -> None:
        """The probes have fallen: back to the last good generation.

        Raises:
            HogwildError: it failed half-way, and the service cannot go on.
        """
        self._schedule.collect(wait=True)  # one that is not kept, because of this
        try:
            with self._attachment.changing:
                done = trips.go_back(self._ledger, self._keeper, learner, go_on=go_on)
        except HogwildError as error:
            self.stuck = True
            log.error("guard.stuck", error=str(error))
            if rollback.pending(self._ledger) is not None:
                raise
            return
        self._schedule.mark_saved(done["step"])
        self._keeper.start_tidying()

    def on_command(self, command: Command) -> None:
        """A person asks for it.

        Raises:
            HogwildError: it failed half-way, and the service cannot go on.
        """
        number, retrain = command.arguments.get("generation"), command.arguments.get("retrain")
        if type(number) is not int or number < 0 or type(retrain) is not bool:
            command.refuse(f"not a generation: {command.arguments!r:.100}")
            return
        waited = command.age_s
        try:
            with self._attachment.changing:
                learner = self._attachment.learner  # only now: an arena may just have been taken
                done = rollback.roll_back(
                    number,
                    retrain=retrain,
                    ledger=self._ledger,
                    keeper=self._keeper,
                    learner=learner,
                )
        except HogwildError as error:
            log.error("rollback.failed", generation=number, error=str(error))
            command.refuse(str(error))
            if rollback.pending(self._ledger) is not None:
                raise  # the weights may be half-written: the next start finishes it
            return
        self._schedule.collect(wait=True)  # it was under way when the command came
        if learner is not None:
            self._schedule.mark_saved(done["step"])
            if self.stuck or learner.judge.tripped is not None:  # before the command came, or since
                # Training had stopped for it: it begins again once the server is seen to serve these weights.
                self._attachment.must_check = True
            self.stuck, learner.judge.tripped = False, None
        metrics.rollbacks.labels(by="person").inc()
        self._keeper.start_tidying()
        command.done(**done, waited_ms=round(waited * 1000))
