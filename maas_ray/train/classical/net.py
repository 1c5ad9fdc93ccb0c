"""Wraps the graph of a fitted model as a network from preprocessed rows to logits. Independent of scikit-learn."""

import numpy as np
import torch
from torch import Tensor, nn

from maas_ray.bundle.sessions import cpu_session
from maas_ray.data.loading.target_units import scaled_target
from maas_ray.data.spec.features import TargetScaling
from maas_ray.errors import ObjectCorrupt

_SMALLEST = float(np.finfo(np.float32).eps)


class GraphNet(nn.Module):
    """Runs the graph of `graph.py` in onnxruntime, on the CPU, without gradients.

    Its logits are those of other models: logarithms of probabilities for classes, the logit for a binary task.
    Probabilities are clamped to at least 2**-23 (as in scikit-learn's `log_loss`), so that the loss remains finite for
    a tree that is certain and wrong.

    Args:
        graph: serialized ONNX.
        task: classification, binary or regression.
        scaling: regression: the scale of other models' outputs; the graph's are in the units of the data.
        num_threads: number of compute threads; 0: the number of cores.

    Raises:
        ObjectCorrupt: onnxruntime cannot load the graph.
    """

    def __init__(self, graph: bytes, task: str, num_threads: int = 0, scaling: TargetScaling | None = None) -> None:
        super().__init__()
        self.graph = graph
        self._task, self._scaling = task, scaling
        try:
            self._session = cpu_session(graph, num_threads)
        except Exception as error:
            raise ObjectCorrupt(f"onnxruntime cannot load the graph of the fitted model: {error}") from error
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name

    def forward(self, rows: Tensor) -> Tensor:
        """Computes logits float32 [N, K] from float32 [N, ...]."""
        flat = rows.flatten(1).cpu().numpy()
        values = torch.from_numpy(self._session.run([self._output], {self._input: flat})[0]).to(rows.device)
        if self._task == "classification":
            return values.clamp(min=_SMALLEST).log()
        if self._task == "binary":
            return torch.logit(values, eps=_SMALLEST)
        return torch.from_numpy(scaled_target(self._scaling, values.cpu().numpy())).to(rows.device)
