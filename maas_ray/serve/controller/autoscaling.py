"""How many replicas a pool should have, from what its replicas count themselves. Knows no Ray: it is called with a context.

Serve cannot count requests that are answered below its own wrapper, so each replica reports `Meter.read`, and Serve's
controller calls a `Scaler` ten times a second. Growing asks that the need has lasted for a moment, shrinking that it
was smaller all the while: a load that only trembles changes nothing.
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from maas_ray.spec import Spec

ONGOING, BUSY, RATE = "maas_ongoing", "maas_busy", "maas_rate"
"""What `Meter.read` returns: requests in a replica, share of the time that its engine ran, requests ended per second."""

METRICS_INTERVAL_S = 0.5
"""Seconds between two reports of a replica, in pools of up to 100 replicas; see `report_interval_s`."""
MAX_REPORTS_PER_S = 200
"""Of all replicas of a pool. Each takes Serve's controller, one process, some 1.1 ms (docs/clusters/scale.md)."""


def report_interval_s(max_replicas: int) -> float:
    """Seconds between two reports of a replica of a pool that may have so many."""
    return max(METRICS_INTERVAL_S, max_replicas / MAX_REPORTS_PER_S)


class AutoscalingSpec(Spec):
    """When replicas are added and taken away, between the bounds of `replicas`."""

    preset: Literal["latency", "balanced", "throughput"] = "balanced"
    """`latency`: many replicas with short queues. `throughput`: few, whose batches are full. The rest overrides it."""
    target_ongoing: PositiveFloat | None = None
    """Requests in one replica, waiting or running, that are aimed at; None: from the preset and the largest batch."""
    upscale_delay_s: NonNegativeFloat | None = None
    """How long more replicas must have been needed before they are started; None: from the preset."""
    downscale_delay_s: NonNegativeFloat | None = None
    """How long fewer must have been enough before some are stopped; None: from the preset."""
    look_back_s: float | None = None
    """Time over which reports are averaged, at least 1 s; None: from the preset."""
    scale_to_zero_after_s: NonNegativeFloat = 300.0
    """With `replicas.min` 0: time without any request after which the last replica is stopped."""

    def resolve(self, max_batch_size: int, capacity: int) -> "Resolved":
        """Every number.

        Args:
            max_batch_size: most rows of one run.
            capacity: requests that one replica can hold; a target beyond it would never be reached.
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
    """An `AutoscalingSpec` with nothing left to derive."""

    target_ongoing: float
    target_busy: float
    """Share of the time that an engine may run; 0: not looked at."""
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_s: float
    scale_to_zero_after_s: float

    def scaler_options(self) -> dict[str, float]:
        """The keyword arguments of `Scaler`."""
        return self.model_dump(exclude={"look_back_s"})


# Requests in a replica as a share of its largest batch and at most, engine's share of the time, delays, look-back.
# 1.4 batches: enough to fill one while another one runs.
_PRESETS = {
    "latency": (0.25, 8.0, 0.6, 0.5, 120.0, 1.5),
    "balanced": (1.4, 22.4, 0.85, 0.5, 60.0, 2.0),
    "throughput": (2.0, 256.0, 0.0, 3.0, 60.0, 4.0),
}


class Meter:
    """Turns a replica's running totals into what happened since the last look."""

    def __init__(self) -> None:
        self._last: tuple[float, int, float, float] | None = None

    def read(self, snapshot: Mapping[str, Any], num_ongoing: int, now_s: float | None = None) -> dict[str, float]:
        """Figures of the time since the last call; what `record_autoscaling_stats` of a replica returns.

        Args:
            snapshot: of `ReplicaStats`.
            num_ongoing: requests that the replica holds now, waiting or running.
            now_s: of a monotonic clock; None reads it.
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
        # A look falls between two runs, when the answers have just been sent and the next requests are not yet read:
        # the time that ended requests have spent gives the mean of the whole interval (Little's law).
        return {ONGOING: max(float(num_ongoing), spent / span_s), BUSY: min(1.0, ran / span_s), RATE: ended / span_s}


class Scaler:
    """The policy that Serve's controller calls; it is sent there by value, so it uses the standard library only.

    Args:
        target_ongoing: requests in one replica that are aimed at.
        target_busy: share of the time that an engine may run; 0: not looked at.
        upscale_delay_s: how long more replicas must have been needed.
        downscale_delay_s: how long fewer must have been enough.
        scale_to_zero_after_s: time without a request after which the last replica goes, where the bounds allow it.
    """

    TOLERANCE = 0.1
    """A need that exceeds a whole number of replicas by less starts no further one."""
    SPARE = 1.15
    """A replica is stopped only if the others have this much more than what is needed."""
    TICK_S = 0.1
    """Time between two calls."""
    LOOK_S_PER_REPLICA = 0.001
    """Time between two looks at the reports of all replicas, which take Serve 10 microseconds of each: up to 100 replicas
    at each call, beyond that so that a look takes 1 % of a core, and no longer than `METRICS_INTERVAL_S`."""

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
        self._ups: deque[tuple[float, int]] = deque()  # (time, replicas needed at least)
        self._downs: deque[tuple[float, int]] = deque()  # (whole second, most replicas needed with some to spare)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state: Serve applies the bounds.

        Args:
            ctx: Serve's `AutoscalingContext`.
        """
        now_s = ctx.current_time
        target: int = ctx.target_num_replicas
        if self._start_s is None:
            self._start_s = self._active_s = now_s
        if ctx.current_num_replicas == 0:
            # Nobody reports. Whatever waits at a proxy needs the first replica; one that is starting is not given up.
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
        """Replicas' worth of work, and whether there is any at all."""
        metrics = ctx.aggregated_metrics or {}
        waiting = _waiting(ctx)
        if ONGOING not in metrics:
            # A deployment that reports nothing: what Serve sees.
            ongoing = float(ctx.total_num_requests)
            return ongoing / self._target_ongoing, ongoing > 0
        ongoing = sum(metrics[ONGOING].values()) + waiting
        load = ongoing / self._target_ongoing
        if self._target_busy > 0:
            # More replicas than requests help nobody.
            busy = sum(metrics.get(BUSY, {}).values()) / self._target_busy
            load = max(load, min(busy, ongoing))
        return load, ongoing > 0 or sum(metrics.get(RATE, {}).values()) > 0

    def _remember(self, now_s: float, load: float, is_active: bool) -> None:
        self._ups.append((now_s, math.ceil(load - self.TOLERANCE)))
        # One older than the window stays: it tells what was needed when the window began.
        while len(self._ups) > 1 and self._ups[1][0] <= now_s - self._upscale_delay_s:
            self._ups.popleft()
        second, need = float(int(now_s)), max(int(is_active), math.ceil(load * self.SPARE))
        if self._downs and self._downs[-1][0] == second:
            need = max(need, self._downs.pop()[1])
        self._downs.append((second, need))
        while self._downs[0][0] < now_s - self._downscale_delay_s - 1:
            self._downs.popleft()


def _waiting(ctx: Any) -> float:
    """Requests that wait at Serve's own proxies and handles."""
    return float(ctx.total_queued_requests or 0.0)
