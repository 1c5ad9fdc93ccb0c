"""A network with the fixed preprocessing of its raw columns."""

from torch import Tensor, nn

from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.features import Features


class RawModel(nn.Module):
    """Encoded raw columns -> logits [N, K]: the fixed preprocessing, then the trained network."""

    def __init__(self, features: Features, net: nn.Module) -> None:
        super().__init__()
        self.preprocess = Preprocess(features)
        self.net = net

    def forward(self, *columns: Tensor) -> Tensor:
        logits: Tensor = self.net(self.preprocess(*columns))
        return logits
