import pytest
import torch
from torch import nn

from maas_ray.train.optim.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_orthogonalization_keeps_the_singular_vectors_and_brings_the_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ orthogonalized(matrix) @ right.T
    torch.testing.assert_close(values, torch.diag(values.diag()), rtol=0.0, atol=1e-10)
    assert ((values.diag() > 0.6) & (values.diag() < 1.3)).all()


def test_whole_matrices_are_updated_as_by_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(8, 5)) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.01)
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(8, 5)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=5e-3)  # torch iterates in bfloat16
