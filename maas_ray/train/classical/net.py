"""A fitted model's graph in the place of a network: preprocessed rows to logits. Knows no store and no scikit-learn."""

import numpy as np
import torch
from torch import Tensor, nn

from maas_ray.bundle.sessions import cpu_session
from maas_ray.errors import ObjectCorrupt

_SMALLEST = float(np.finfo(np.float32).eps)


class GraphNet(nn.Module):
    """Runs the graph of `graph.py` in onnxruntime, on the CPU, without gradients.

    Its logits are what other models give: logarithms of probabilities for classes, the logit for a binary task. A
    probability counts as at least 2**-23 there (as in scikit-learn's `log_loss`), so that the loss stays finite for a
    tree that is sure and wrong.

    Args:
        graph: serialized ONNX.
        task: classification, binary or regression.
        num_threads: compute threads; 0: as many as cores.

    Raises:
        ObjectCorrupt: onnxruntime cannot load the graph.
    """

    def __init__(self, graph: bytes, task: str, num_threads: int = 0) -> None:
        super().__init__()
        self.graph = graph
        self._task = task
        try:
            self._session = cpu_session(graph, num_threads)
        except Exception as error:
            raise ObjectCorrupt(f"onnxruntime cannot load the graph of the fitted model: {error}") from error
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name

    def forward(self, rows: Tensor) -> Tensor:
        """From float32 [N, ...] to logits float32 [N, K]."""
        flat = rows.flatten(1).cpu().numpy()
        values = torch.from_numpy(self._session.run([self._output], {self._input: flat})[0]).to(rows.device)
        if self._task == "classification":
            return values.clamp(min=_SMALLEST).log()
        return torch.logit(values, eps=_SMALLEST) if self._task == "binary" else values
