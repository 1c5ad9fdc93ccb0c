"""The engine's process: creates the engine, reports its properties, then runs the requests of each channel.

The engine's stages are reported before they begin, so that the parent knows the stage in which the process died.
"""

import os
import resource
import socket
import struct
import threading
from typing import Any

from onnx import TensorProto, helper

from maas_ray.bundle.apart import messages
from maas_ray.bundle.apart.region import Region
from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.bundle.format import Bundle, BundleInfo, Lineage, Signature, TensorSpec
from maas_ray.confined.frames import receive_frame, send_frame
from maas_ray.errors import EngineFailed, MaasError

STOP = struct.Struct("<BI")
"""A stop message: the index of the channel and the number of the run."""


def prepare() -> None:
    """Runs once in the fork server before the first child: work that would take each child tens of milliseconds.

    The runtime and the checker register their operators on first use. The graph is ours; its session has no threads.
    """
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1])
    model = helper.make_model(
        helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "ours", [x], [y]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    signature = Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),),
    )
    lineage = Lineage(run="", step=0, checkpoint_digest="", data_digest="", spec_digest="")
    info = BundleInfo(signature=signature, task="other", parity={}, metrics={}, lineage=lineage)
    Engine(Bundle("", info, model.SerializeToString()), EngineSpec(threads=1)).close()


def serve(sock: socket.socket, descriptors: list[int]) -> None:
    """Entry point of the process.

    Args:
        sock: receives the bundle, and sends stages and the engine's properties; the process ends when it is closed.
        descriptors: for each channel its socket, the region that it reads and the region that it writes.
    """
    request, blobs = receive_frame(sock)
    bundle = Bundle(
        request["id"],
        BundleInfo.model_validate(request["info"]),
        bytes(blobs[0]),
        bytes(blobs[1]) if len(blobs) > 1 else None,
    )
    spec = EngineSpec.model_validate(request["spec"])
    del blobs
    try:
        engine = Engine(bundle, spec, skip=request["skip"], on_stage=lambda stage: send_frame(sock, {"stage": stage}))
    except MaasError as error:
        send_frame(sock, {"error": error.code, "args": list(error.args)})
        return
    except MemoryError:
        send_frame(sock, {"memory": True})
        return
    del bundle
    hazards = engine.hazards
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    send_frame(
        sock,
        {
            "value": {
                "hazards": {
                    "has_loops": hazards.has_loops,
                    "is_value_bounded": hazards.is_value_bounded,
                    "can_trap": hazards.can_trap,
                    "reasons": list(hazards.reasons),
                },
                "not_merged_because": engine.not_merged_because,
                "not_padded_because": engine.not_padded_because,
                "providers": list(engine.providers),
                "signature": engine.signature.model_dump(mode="json"),
                "warmed_with": engine.warmed_with,
            }
        },
    )
    channels = [_ChannelServer(engine, *descriptors[place : place + 3]) for place in range(0, len(descriptors), 3)]
    for channel in channels:
        threading.Thread(target=channel.serve, daemon=True).start()
    sock.settimeout(None)
    while len(word := sock.recv(STOP.size, socket.MSG_WAITALL)) == STOP.size:
        place, number = STOP.unpack(word)
        channels[place].stop(number)
    os._exit(0)


class _ChannelServer:
    """Runs the requests of one socket, one at a time."""

    def __init__(self, engine: Engine, descriptor: int, inputs: int, outputs: int) -> None:
        self._engine = engine
        self._socket = socket.socket(fileno=descriptor)
        self._inputs, self._outputs = Region(inputs), Region(outputs)
        self._number = 0
        self._stop = StopSignal()

    def serve(self) -> None:
        while True:
            try:
                request = messages.receive(self._socket)
            except (EOFError, OSError):
                return
            self._stop = StopSignal()
            self._number = request["number"]
            messages.send(self._socket, self._answer(request, self._stop))

    def stop(self, number: int) -> None:
        """Stops a run, unless it has ended: the next run belongs to another request."""
        stop = self._stop
        if number == self._number:
            stop.set()

    def _answer(self, request: dict[str, Any], stop: StopSignal) -> dict[str, Any]:
        try:
            given = self._inputs.read(request["inputs"], is_copied=False)
            results, run_s = self._engine.timed_run(given, request["rows"], stop)
            places = self._outputs.write(results)
        except MaasError as error:
            return {"error": error.code, "args": error.args, "cause": str(error.__cause__ or "")[:1000]}
        except MemoryError as error:
            failure = EngineFailed(
                "the model needs more memory for these inputs than the limit of its process; send fewer rows"
            )
            return {"error": failure.code, "args": failure.args, "cause": str(error)[:1000]}
        return {"outputs": places, "run_s": run_s}
