"""Triton's model.py: one onnxruntime run for all requests of a batch. Runs inside Triton's python backend."""

import json

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = parameters["onnx"]["string_value"]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        rows = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        (result,) = self.session.run(["y"], {"x": np.concatenate(rows) if len(rows) > 1 else rows[0]})
        responses, start = [], 0
        for part in rows:
            end = start + len(part)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", result[start:end])]))
            start = end
        return responses
