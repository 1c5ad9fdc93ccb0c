"""onnxruntime in a loop with one thread: rows a second. Arguments: ONNX file, batch, seconds."""

import json
import sys
import time

import numpy as np
import onnxruntime

path, batch, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
tensor = session.get_inputs()[0]
dtype = np.int64 if "int64" in tensor.type else np.float32
rows = np.random.default_rng(1).integers(0, 1000, (batch, *tensor.shape[1:])).astype(dtype)
session.run(None, {tensor.name: rows})
num_runs, begin = 0, time.perf_counter()
while time.perf_counter() - begin < seconds:
    session.run(None, {tensor.name: rows})
    num_runs += 1
print(json.dumps({"rows_per_s": num_runs * batch / (time.perf_counter() - begin)}))
