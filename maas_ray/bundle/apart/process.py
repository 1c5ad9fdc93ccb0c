"""One engine's process: started with limits, monitored while it loads, used over its channels.

The first load of a version happens here, even if the version then runs in the replica: a file that makes onnxruntime
crash, hang or exhaust the memory does so in this process, because the same library repeats it for the same bytes.
"""

import math
import socket
import time
from collections.abc import Mapping
from typing import Any

from maas_ray import confined
from maas_ray.bundle.apart import messages
from maas_ray.bundle.apart.region import Region
from maas_ray.bundle.apart.service import STOP
from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.engine import EngineSpec
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.bundle.format import Bundle, Signature
from maas_ray.bundle.graph.hazards import Hazards
from maas_ray.bundle.nature import Nature
from maas_ray.confined import Limits
from maas_ray.confined.child import error_of
from maas_ray.errors import (
    BundleError,
    ConfinedError,
    ConfinedKilled,
    ConfinedOutOfMemory,
    ConfinedTimeout,
    MaasError,
)

BASE_MEMORY_BYTES = 2 << 30
FILE_FACTOR = 6
"""Memory limit of a process: a base plus this multiple of the file's size. Loading uses about five times the file."""
MAX_DEATHS = 4
"""Kinds of synthetic warm-up values that may kill the process before the version is rejected."""


LOOK_S = 0.1
"""Interval at which a thread that waits for a run checks whether the run must be stopped."""
STOP_GRACE_S = 1.0
"""Time after which a run that ignores a stop signal is stopped with its process."""


class StopIgnored(Exception):
    """A run ignores its stop signal, because one node of its graph takes long."""


class EngineProcess:
    """A process that has loaded a bundle; created by `start_process`.

    Args:
        child: the process.
        channels: one per concurrent run.
        nature: properties of the version.
    """

    def __init__(self, child: confined.Child, channels: "list[RunChannel]", nature: Nature) -> None:
        self.child = child
        self.channels = channels
        self.nature = nature

    def has_ended(self) -> bool:
        """Whether the process has ended without being stopped."""
        return self.child.has_ended()

    def close(self) -> None:
        """Kills the process and releases all resources; a run in progress fails."""
        self.child.close()
        for channel in self.channels:
            channel.close()


class RunChannel:
    """The channel of one run at a time: a socket, the region of the inputs and the region of the outputs."""

    def __init__(self, place: int) -> None:
        self.socket, self._theirs = socket.socketpair()
        self.socket.settimeout(LOOK_S)
        self._place = place
        self._number = 0
        self._control = self.socket
        self.inputs, self.outputs = Region.create(), Region.create()

    def descriptors(self) -> list[int]:
        """The descriptors to duplicate for the process."""
        return [self._theirs.fileno(), self.inputs.fileno(), self.outputs.fileno()]

    def handed_over(self, control: socket.socket) -> None:
        """Closes this process's copies: from now on only the engine's process keeps its side of the socket open.

        Args:
            control: socket over which stop signals are sent.
        """
        self._theirs.close()
        self._control = control

    def run(
        self, inputs: Mapping[str, Array], num_rows: int, stop: StopSignal | None = None
    ) -> tuple[dict[str, Array], float]:
        """Runs the graph once.

        Args:
            inputs: as for the engine.
            num_rows: number of rows.
            stop: signal to stop the run early.

        Raises:
            StopIgnored: the run ignored the stop signal; only killing the process ends it.
            EOFError, OSError: the process has died.
            MaasError: raised by the engine.
        """
        self._number += 1
        word = STOP.pack(self._place, self._number)
        messages.send(self.socket, {"number": self._number, "rows": num_rows, "inputs": self.inputs.write(inputs)})
        if stop is not None:
            stop.tell(lambda: self._say(word))
        answer = self._wait(stop)
        try:
            if "error" in answer:
                raise error_of(answer["error"], answer["args"]) from MaasError(answer["cause"])
            return self.outputs.read(answer["outputs"], is_copied=True), answer["run_s"]
        finally:
            self.inputs.shrink()
            self.outputs.shrink()

    def _wait(self, stop: StopSignal | None) -> dict[str, Any]:
        until_s = math.inf
        while True:
            try:
                answer: dict[str, Any] = messages.receive(self.socket)
            except TimeoutError:
                if stop is not None and stop.is_set:
                    until_s = min(until_s, time.monotonic() + STOP_GRACE_S)
                if time.monotonic() > until_s:
                    raise StopIgnored from None
            else:
                return answer

    def _say(self, word: bytes) -> None:
        try:
            self._control.send(word)
        except OSError:
            return  # the process has already ended

    def close(self) -> None:
        self.socket.close()
        self._theirs.close()
        self.inputs.close()
        self.outputs.close()


def start_process(bundle: Bundle, spec: EngineSpec, wall_s: float) -> EngineProcess:
    """Loads a bundle in a new process.

    Synthetic warm-up values that kill the process are skipped, and the process is restarted: they show that some values
    are dangerous, not that all are.

    Args:
        bundle: bundle with an untrusted graph.
        spec: spec of the engine.
        wall_s: longest time of the load; then the process is killed.

    Raises:
        BundleError: it cannot be loaded, or loading it crashes, hangs or takes too much memory; the message says which.
        ConfinedError: the process cannot be started.
    """
    killed_by: list[str] = []
    while True:
        stages: list[str] = []
        try:
            process = _start(bundle, spec, wall_s, killed_by, stages.append)
        except ConfinedKilled as error:
            values = stages[-1] if stages else ""
            is_guess = values not in ("", "session", "recorded values")
            if not is_guess or len(killed_by) + 1 >= MAX_DEATHS or not error.signal:
                raise _defect(bundle, stages, error) from error
            killed_by.append(values)
        except (ConfinedTimeout, ConfinedOutOfMemory) as error:
            raise _defect(bundle, stages, error) from error
        else:
            return process


def _start(bundle: Bundle, spec: EngineSpec, wall_s: float, skip: list[str], on_stage: Any) -> EngineProcess:
    memory_bytes = BASE_MEMORY_BYTES + FILE_FACTOR * len(bundle.graph)
    limits = Limits(
        wall_s=wall_s,
        cpu_s=wall_s * max(1, spec.threads),
        memory_bytes=None if spec.gpus > 0 else memory_bytes,
        file_bytes=None,  # it grows the region of the outputs to their size
    )
    channels = [RunChannel(place) for place in range(spec.instances)]
    descriptors = [descriptor for channel in channels for descriptor in channel.descriptors()]
    try:
        child = confined.start(
            "maas_ray.bundle.apart.service:serve", limits, what="the graph", is_service=True, descriptors=descriptors
        )
    except ConfinedError:
        for channel in channels:
            channel.close()
        raise
    process: EngineProcess | None = None
    try:
        for channel in channels:
            channel.handed_over(child.socket)
        request = {
            "id": bundle.id,
            "info": bundle.info.model_dump(mode="json"),
            "spec": spec.model_dump(mode="json"),
            "skip": skip,
        }
        child.send(request, [bundle.graph, *([bundle.sample] if bundle.sample is not None else [])])
        found = child.result(on_stage).payload
        nature = Nature(
            hazards=Hazards(**{**found["hazards"], "reasons": tuple(found["hazards"]["reasons"])}),
            not_merged_because=found["not_merged_because"],
            not_padded_because=found["not_padded_because"],
            providers=tuple(found["providers"]),
            signature=Signature.model_validate(found["signature"]),
            warmed_with=found["warmed_with"],
            killed_by=tuple(skip),
        )
        process = EngineProcess(child, channels, nature)
    finally:
        if process is None:
            child.close()
            for channel in channels:
                channel.close()
    return process


def _defect(bundle: Bundle, stages: list[str], error: ConfinedError) -> BundleError:
    doing = "is loaded into a session" if not stages else "is run for the first time"
    if stages and stages[-1] not in ("session", "recorded values"):
        doing += f" (on {stages[-1]})"
    why = {
        ConfinedTimeout: "did not end in time and was stopped",
        ConfinedOutOfMemory: "exceeded its memory limit",
    }.get(type(error), "died")
    return BundleError(
        f"bundle {bundle.id} cannot be served: the process in which it {doing} {why} ({error}); other models are not "
        "affected; export the model again, without the operators that cause this"
    )
