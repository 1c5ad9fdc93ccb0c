"""The retry policy of a client. Does not sleep; independent of connections."""

import random
from dataclasses import dataclass

from maas_ray.errors import MaasError, Overloaded

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0


@dataclass(frozen=True)
class Retries:
    """A retry policy: exponential backoff with full jitter, or the server's `Retry-After`.

    An inference changes nothing on the server, so that a refused or broken connection and a 503 are safe to retry,
    until the deadline of the call. A 504 is not retried: its deadline has passed.
    """

    max_attempts: int = 4

    def pause_s(self, attempt: int, error: MaasError | None, left_s: float) -> float | None:
        """Seconds to wait before the next attempt; None: no further attempt.

        Args:
            attempt: number of the failed attempt, from 1.
            error: error in the server's response; None after a failed connection.
            left_s: seconds until the deadline of the call.
        """
        if attempt >= self.max_attempts or (error is not None and not isinstance(error, Overloaded)):
            return None
        if error is not None:
            pause_s = error.retry_after_s
        else:
            pause_s = random.uniform(0.0, min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))  # noqa: S311
        return pause_s if pause_s < left_s else None
