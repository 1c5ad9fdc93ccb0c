"""When a client sends a request again, and after which pause. Sleeps nowhere; knows no connection."""

import random
from dataclasses import dataclass

from maas_ray.errors import MaasError, Overloaded

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0


@dataclass(frozen=True)
class Retries:
    """The policy: exponential backoff with full jitter, and the server's `Retry-After` where it names one.

    Only what is safe to repeat is: an inference changes nothing on the server, so a refused or broken connection and a
    503 are tried again, until the deadline of the whole call. A 504 is not: its deadline has passed.
    """

    max_attempts: int = 4

    def pause_s(self, attempt: int, error: MaasError | None, left_s: float) -> float | None:
        """Seconds to wait before the next attempt; None: give up.

        Args:
            attempt: number of the attempt that failed, from 1.
            error: the server's response; None where there was none (a connection that failed).
            left_s: seconds until the deadline of the call.
        """
        if attempt >= self.max_attempts or (error is not None and not isinstance(error, Overloaded)):
            return None
        if error is not None:
            pause_s = error.retry_after_s
        else:
            pause_s = random.uniform(0.0, min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))  # noqa: S311
        return pause_s if pause_s < left_s else None
