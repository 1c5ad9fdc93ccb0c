"""The session that every Python peer runs, and its plain JSON, so that only the servers differ. Runs in a peer's environment."""

import os

import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Model:
    """The ONNX file named by the variable BENCH_MODEL."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("BENCH_THREADS", "1"))
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.dtype = DTYPES[self.session.get_inputs()[0].type]

    def read(self, request):
        """Rows of a parsed request."""
        tensor = request["inputs"][0]
        return np.asarray(tensor["data"], self.dtype).reshape(tensor["shape"])

    def run(self, rows):
        return self.session.run(["y"], {"x": rows})[0]

    def run_all(self, parts):
        """One run for the rows of several requests."""
        if len(parts) == 1:
            return [self.run(parts[0])]
        result = self.run(np.concatenate(parts))
        return np.split(result, np.cumsum([len(part) for part in parts])[:-1])

    @staticmethod
    def write(result):
        """An answer as plain values."""
        data = result.ravel().tolist()
        return {"outputs": [{"name": "y", "shape": list(result.shape), "datatype": "FP32", "data": data}]}
