"""Weights that are split over ranks: whole tensors or DTensors, of which each rank has a part."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local(value: Tensor) -> Tensor:
    """This rank's part."""
    return value.to_local() if isinstance(value, DTensor) else value


def reshard(parts: Sequence[nn.Module]) -> None:
    """Drops gathered weights that FSDP2 has kept after the last forward pass, since it would use them again."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
