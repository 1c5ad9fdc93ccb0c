"""The progress of a search on stderr: a line for each trial that ends, and the newest metric in the status."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from maas_ray.console.output import say
from maas_ray.process.interrupts import exit_code, last
from maas_ray.train.search.log import MetricValue, TrialEnded
from maas_ray.train.search.run import describe
from maas_ray.train.search.spec import TuneSpec

OnEvent = Callable[[int, MetricValue | TrialEnded], None]
"""Called with the number of a trial and each of its metrics, and its end."""


@contextmanager
def trial_progress(search: TuneSpec, num_trials: int, what: str) -> Iterator[OnEvent]:
    """Shows the progress of a search during a block, which passes the events of its trials.

    Args:
        search: the search.
        num_trials: number of its trials.
        what: the word for trials, in the plural.
    """
    num_ended = 0
    with say.status(f"{num_trials} {what}") as status:

        def show(trial: int, event: MetricValue | TrialEnded) -> None:
            nonlocal num_ended
            text = describe(search, trial, event)
            if isinstance(event, TrialEnded):
                num_ended += 1
                say.print(text, markup=False)
            else:
                status.update(f"{num_ended} of {num_trials} {what} have ended; {text}")

        yield show


def search_exit_code(is_complete: bool) -> int:
    """The exit code of a search: 0 if it is complete, that of the signal that ended it, else 1."""
    number = last() if not is_complete else None
    return int(not is_complete) if number is None else exit_code(number)
