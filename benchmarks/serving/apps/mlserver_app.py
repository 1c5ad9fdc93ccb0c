"""MLServer: a custom runtime around onnxruntime. Its batching merges requests before `predict`."""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from raw_session import Model


class Runtime(MLModel):
    async def load(self) -> bool:
        self.raw = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = np.asarray(NumpyCodec.decode_input(payload.inputs[0]), self.raw.dtype)
        output = NumpyCodec.encode_output("y", self.raw.run(rows))
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[output])
