"""Autoscaling: derives the number of replicas of a pool from the replicas' own statistics. Independent of Ray.

Serve cannot count requests that are answered before its own wrapper, so each replica reports `Meter.read`, and Serve's
controller calls a `Scaler` ten times a second. Scaling up requires that the need lasted for some time, scaling down
that it was lower during a whole period: small fluctuations of the load change nothing.
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from maas_ray.spec import Spec

ONGOING, BUSY, RATE = "maas_ongoing", "maas_busy", "maas_rate"
"""Keys of `Meter.read`: requests in a replica, share of the time that its engine ran, requests completed per second."""

METRICS_INTERVAL_S = 0.5
"""Seconds between two reports of a replica, in pools of up to 100 replicas; see `report_interval_s`."""
MAX_REPORTS_PER_S = 200
"""Maximum reports of all replicas of a pool. Each takes Serve's controller, one process, some 1.1 ms
(docs/clusters/scale.md)."""


def report_interval_s(max_replicas: int) -> float:
    """Returns the seconds between two reports of a replica in a pool of this size."""
    return max(METRICS_INTERVAL_S, max_replicas / MAX_REPORTS_PER_S)


class AutoscalingSpec(Spec):
    """When replicas are added and removed, between the limits in `replicas`."""

    preset: Literal["latency", "balanced", "throughput"] = "balanced"
    """`latency`: many replicas with short queues. `throughput`: few replicas with full batches. Other fields override
    it."""
    target_ongoing: PositiveFloat | None = None
    """Target number of waiting and running requests per replica; None: from the preset and the largest batch."""
    upscale_delay_s: NonNegativeFloat | None = None
    """Time for which more replicas must have been needed before they are started; None: from the preset."""
    downscale_delay_s: NonNegativeFloat | None = None
    """Time for which fewer replicas must have sufficed before some are stopped; None: from the preset."""
    look_back_s: float | None = None
    """Period over which reports are averaged, at least 1 s; None: from the preset."""
    scale_to_zero_after_s: NonNegativeFloat = 300.0
    """With `replicas.min` 0: time without a request after which the last replica is stopped."""

    def resolve(self, max_batch_size: int, capacity: int) -> "Resolved":
        """Returns the spec without missing values.

        Args:
            max_batch_size: maximum rows of one run.
            capacity: maximum requests of one replica; a target above it would never be reached.
        """
        share, most, busy, up_s, down_s, look_back_s = _PRESETS[self.preset]
        return Resolved(
            target_ongoing=self.target_ongoing or max(2.0, min(most, share * max_batch_size, 0.7 * capacity)),
            target_busy=busy,
            upscale_delay_s=up_s if self.upscale_delay_s is None else self.upscale_delay_s,
            downscale_delay_s=down_s if self.downscale_delay_s is None else self.downscale_delay_s,
            look_back_s=max(1.0, look_back_s if self.look_back_s is None else self.look_back_s),
            scale_to_zero_after_s=self.scale_to_zero_after_s,
        )


class Resolved(Spec):
    """An `AutoscalingSpec` without missing values."""

    target_ongoing: float
    target_busy: float
    """Target share of the time in which an engine runs; 0: not considered."""
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_s: float
    scale_to_zero_after_s: float

    def scaler_options(self) -> dict[str, float]:
        """Keyword arguments of `Scaler`."""
        return self.model_dump(exclude={"look_back_s"})


# Requests in a replica as a share of its largest batch, and their maximum, engine's share of the time, delays,
# look-back. 1.4 batches: enough to fill one while another one runs.
_PRESETS = {
    "latency": (0.25, 8.0, 0.6, 0.5, 120.0, 1.5),
    "balanced": (1.4, 22.4, 0.85, 0.5, 60.0, 2.0),
    "throughput": (2.0, 256.0, 0.0, 3.0, 60.0, 4.0),
}


class Meter:
    """Converts a replica's cumulative totals to the differences since the last call."""

    def __init__(self) -> None:
        self._last: tuple[float, int, float, float] | None = None

    def read(self, snapshot: Mapping[str, Any], num_ongoing: int, now_s: float | None = None) -> dict[str, float]:
        """Returns the metrics since the last call, for `record_autoscaling_stats` of a replica.

        Args:
            snapshot: snapshot of `ReplicaStats`.
            num_ongoing: number of waiting and running requests in the replica now.
            now_s: time on a monotonic clock; None reads it.
        """
        now_s = time.monotonic() if now_s is None else now_s
        models = snapshot["models"]
        num_ended = sum(sum(model["outcomes"].values()) for model in models)
        spent_s = sum(model["request"]["ns"] + model["fail_ns"] for model in models) / 1e9
        run_s = sum(ns for model in models for _, _, ns in model["batches"]) / 1e9
        last, self._last = self._last, (now_s, num_ended, spent_s, run_s)
        if last is None or now_s <= last[0]:
            return {ONGOING: float(num_ongoing), BUSY: 0.0, RATE: 0.0}
        ended, spent, ran = (max(0.0, new - old) for new, old in zip(self._last[1:], last[1:], strict=True))
        span_s = now_s - last[0]
        # A call happens between two runs, when the responses were just sent and the next requests are not yet read:
        # the time spent by completed requests gives the mean of the whole interval (Little's law).
        return {ONGOING: max(float(num_ongoing), spent / span_s), BUSY: min(1.0, ran / span_s), RATE: ended / span_s}


class Scaler:
    """Autoscaling policy called by Serve's controller; it is pickled by value, so it uses only the standard library.

    Args:
        target_ongoing: target number of requests per replica.
        target_busy: target share of the time in which an engine runs; 0: not considered.
        upscale_delay_s: time for which more replicas must have been needed.
        downscale_delay_s: time for which fewer must have sufficed.
        scale_to_zero_after_s: time without a request after which the last replica is stopped, if the limits allow it.
    """

    TOLERANCE = 0.1
    """If the need exceeds a whole number of replicas by less than this, no further replica is started."""
    SPARE = 1.15
    """A replica is stopped only if the others have this factor of the capacity needed."""
    TICK_S = 0.1
    """Seconds between two calls."""
    LOOK_S_PER_REPLICA = 0.001
    """Seconds per replica between two evaluations of all reports, which take Serve 10 microseconds per replica: up to
    100 replicas at each call, above that so that the evaluation takes 1 % of a core, but at least every
    `METRICS_INTERVAL_S`."""

    def __init__(
        self,
        target_ongoing: float,
        target_busy: float,
        upscale_delay_s: float,
        downscale_delay_s: float,
        scale_to_zero_after_s: float,
    ) -> None:
        self._target_ongoing = target_ongoing
        self._target_busy = target_busy
        self._upscale_delay_s = upscale_delay_s
        self._downscale_delay_s = downscale_delay_s
        self._idle_s = scale_to_zero_after_s
        self._start_s: float | None = None
        self._active_s = 0.0
        self._seen = (0.0, False)
        self._look_s = 0.0
        self._ups: deque[tuple[float, int]] = deque()  # (time, minimum replicas needed)
        self._downs: deque[tuple[float, int]] = deque()  # (whole second, maximum replicas needed, with spare capacity)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Returns the wanted number of replicas, and an empty state; Serve applies the limits.

        Args:
            ctx: Serve's `AutoscalingContext`.
        """
        now_s = ctx.current_time
        target: int = ctx.target_num_replicas
        if self._start_s is None:
            self._start_s = self._active_s = now_s
        if ctx.current_num_replicas == 0:
            # No reports. A request waiting at a proxy needs the first replica; a replica that is starting is kept.
            self._ups.clear()
            self._downs.clear()
            self._start_s = self._active_s = now_s
            self._look_s = 0.0
            return max(target, int(_waiting(ctx) > 0)), {}
        if now_s >= self._look_s:
            self._seen = self._load(ctx)
            pause_s = min(METRICS_INTERVAL_S, self.LOOK_S_PER_REPLICA * ctx.current_num_replicas)
            self._look_s = now_s + pause_s if pause_s > self.TICK_S else 0.0
        load, is_active = self._seen
        if is_active:
            self._active_s = now_s
        self._remember(now_s, load, is_active)
        known_s = now_s - max(self._start_s, ctx.last_scale_up_time or 0.0)
        if now_s - self._start_s >= self._upscale_delay_s and (up := min(need for _, need in self._ups)) > target:
            return up, {}
        if known_s >= self._downscale_delay_s and (down := max(1, *(need for _, need in self._downs))) < target:
            return down, {}
        if target == 1 and min(known_s, now_s - self._active_s) >= self._idle_s:
            return 0, {}
        return target, {}

    def _load(self, ctx: Any) -> tuple[float, bool]:
        """Returns the load in replicas, and whether there is any."""
        metrics = ctx.aggregated_metrics or {}
        waiting = _waiting(ctx)
        if ONGOING not in metrics:
            # A deployment without reports: Serve's own count.
            ongoing = float(ctx.total_num_requests)
            return ongoing / self._target_ongoing, ongoing > 0
        ongoing = sum(metrics[ONGOING].values()) + waiting
        load = ongoing / self._target_ongoing
        if self._target_busy > 0:
            # More replicas than requests have no effect.
            busy = sum(metrics.get(BUSY, {}).values()) / self._target_busy
            load = max(load, min(busy, ongoing))
        return load, ongoing > 0 or sum(metrics.get(RATE, {}).values()) > 0

    def _remember(self, now_s: float, load: float, is_active: bool) -> None:
        self._ups.append((now_s, math.ceil(load - self.TOLERANCE)))
        # One entry older than the window is kept: it is the need at the start of the window.
        while len(self._ups) > 1 and self._ups[1][0] <= now_s - self._upscale_delay_s:
            self._ups.popleft()
        second, need = float(int(now_s)), max(int(is_active), math.ceil(load * self.SPARE))
        if self._downs and self._downs[-1][0] == second:
            need = max(need, self._downs.pop()[1])
        self._downs.append((second, need))
        while self._downs[0][0] < now_s - self._downscale_delay_s - 1:
            self._downs.popleft()


def _waiting(ctx: Any) -> float:
    """Returns the number of requests that wait in Serve's own proxies and handles."""
    return float(ctx.total_queued_requests or 0.0)
