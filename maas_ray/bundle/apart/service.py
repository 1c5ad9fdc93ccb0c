"""What runs in an engine's process: makes the engine, says what it is like, then runs what each channel sends it.

The engine's stages are told before they begin, so that whoever started the process knows what killed it.
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
"""Which channel's run is to end: the channel's place and the run's number."""


def prepare() -> None:
    """In the server that starts the processes, before the first one: what each would do again for tens of milliseconds.

    The runtime and the checker register their operators when they are first used. The graph is ours, and has no threads.
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
        sock: takes the bundle, gives stages and what the engine is like; its end is the end of the process.
        descriptors: for each channel its socket, the region that it reads and the one that it writes.
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
    """Runs what arrives on one socket, one run at a time."""

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
        """Ends a run, unless it has ended: the next one is somebody else's."""
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
            failure = EngineFailed("the model needs more memory for these inputs than its process may take")
            return {"error": failure.code, "args": failure.args, "cause": str(error)[:1000]}
        return {"outputs": places, "run_s": run_s}
