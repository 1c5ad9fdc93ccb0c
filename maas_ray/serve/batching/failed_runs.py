"""Failed runs: which of their requests are run again, and with which others.

one bad request   halves of the run, until it is alone and gets the error: about 2 log2(n) runs for n requests
stopped run       each request alone, so that the slow one delays no other
dead process      each request once more, alone; the values of one that was alone are quarantined
"""

from collections.abc import Iterable

from maas_ray.errors import EngineDied, MaasError, RunStopped
from maas_ray.serve.batching.item import Item, live
from maas_ray.serve.batching.ongoing import Ongoing
from maas_ray.serve.batching.quarantine import Quarantine


class FailedRuns:
    """Answers the requests of failed runs, or has them run again.

    Args:
        ongoing: contains the parts to be run again.
        quarantine: receives the values that ended the engine's process.
        name: name of the model version, for messages.
    """

    def __init__(self, ongoing: Ongoing, quarantine: Quarantine, name: str) -> None:
        self._parts = ongoing.retries
        self._quarantine = quarantine
        self._name = name

    def next_part(self) -> list[Item]:
        """Removes the next part that has any unanswered requests, and returns these; empty if there is none."""
        while self._parts:
            if part := live(self._parts.popleft()):
                return part
        return []

    def retry_singly(self, items: Iterable[Item]) -> None:
        """Runs each request again, alone."""
        self._parts.extend([item] for item in items)

    def handle(self, batch: list[Item], error: MaasError | None, now_s: float) -> None:
        """Handles the end of one failed run.

        Args:
            batch: requests of the run.
            error: its error.
            now_s: current time on the loop's clock.
        """
        if isinstance(error, EngineDied):
            self._after_death(live(batch), now_s)
        elif isinstance(error, RunStopped):
            self.retry_singly(sorted(live(batch), key=lambda item: item.deadline))
        elif len(batch) == 1:
            batch[0].deliver(None, error, self._name)
        else:
            middle = len(batch) // 2
            self._parts.extend((batch[:middle], batch[middle:]))

    def _after_death(self, batch: list[Item], now_s: float) -> None:
        for item in batch:
            if not item.has_ended_process:
                item.has_ended_process = True
                self.retry_singly([item])
                continue
            self._quarantine.add(item.inputs, now_s)
            item.deliver(None, self._quarantine.refusal(self._name), self._name)
