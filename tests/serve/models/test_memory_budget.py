"""A model's memory is returned to the system after it is unloaded: measured from outside, in a separate process."""

import ctypes
import json
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, contextlib, dataclasses, json, tempfile
import numpy as np
from onnx import TensorProto, helper
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import NotFound
from maas_ray.serve.models.loader import ModelLoader
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.models import loader
from maas_ray.serve.telemetry.stats import ReplicaStats
from maas_ray.registry.models import Registry
from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, publish
from tests.support.onnx_models import commit_bundle, make_graph, value

SIDE, LAYERS = 1024, 6  # 24 MiB of weights

def graph():
    names = ["x", *(f"h{layer}" for layer in range(LAYERS - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    weights = {f"w{i}": np.random.default_rng(i).random((SIDE, SIDE), np.float32) / SIDE for i in range(LAYERS)}
    shape = ["n", SIDE]
    ends = [value(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    return make_graph(nodes, ends[:1], ends[1:], weights).SerializeToString()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

async def main(store):
    spec = app_spec(store, "big", batching={"max_batch_size": 8}, refresh={"max_parallel_loads": 1})
    made = ModelLoader(store, spec, ReplicaStats(), ByteBudget(1 << 20))
    version = Registry(store).resolve("big")
    absent = dataclasses.replace(version, bundle="0" * 32)
    used = {"before": resident(), "kept": [], "returned": []}
    give_back, apart = loader.return_to_system, loader.large_blocks_apart
    for turn, how in enumerate(["returned", "returned", "returned", "kept", "kept"]):
        loader.return_to_system = give_back if how == "returned" else lambda: None
        loader.large_blocks_apart = apart if how == "returned" else contextlib.nullcontext
        loaded = await made.load(version)
        loaded.batcher.close()
        made.release(loaded)
        del loaded
        await asyncio.sleep(2 * loader.TRIM_DELAY_S)
        with contextlib.suppress(NotFound):
            await made.size(absent)  # in the only thread, after its pending work
        used[how].append(resident())
    made.close()
    print(json.dumps(used))

with tempfile.TemporaryDirectory() as path:
    store = open_store(f"file://{path}/store")
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, SIDE))
    signature = Signature(inputs=(spec,), outputs=(spec.model_copy(update={"name": "y"}),))
    publish(store, "big", commit_bundle(store, graph(), signature))
    asyncio.run(main(store))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; only glibc keeps memory")
def test_memory_returns_after_every_unload() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    used = json.loads(done.stdout)
    # 24 MiB of weights; what stays after the first load is code and tables of onnx and onnxruntime, about 17 MiB.
    assert used["returned"][-1] - used["before"] < 32, used
    assert used["returned"][-1] - used["returned"][0] < 8, used
    assert used["kept"][-1] - used["before"] > 48, "the C library keeps it if it is not asked"


MAPPED = """
import ctypes
from maas_ray.bundle.engine.memory import large_blocks_apart, return_to_system

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class MallocInfo(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

function = ctypes.CDLL(None).mallinfo2
function.restype = MallocInfo
kept = []

def num_mapped():
    kept.append(bytearray(8 << 20))
    return int(function().hblks)

with large_blocks_apart():
    with large_blocks_apart():
        first = num_mapped()
    second = num_mapped()
third = num_mapped()
return_to_system()
print(second - first, third - second)
"""
"""Blocks with a mapping of their own after one more of 8 MiB, in a new process, whose heap has no room for one."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc since 2.33")
def test_large_blocks_may_be_set_apart_by_several_threads_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["1", "0"], "set apart while one thread is inside, from the heap once nobody is"
