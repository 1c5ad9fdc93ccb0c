import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from maas_ray.data.spec.features import Features, TensorColumn
from maas_ray.errors import ModelError, SpecError
from maas_ray.export.onnx_export import export
from maas_ray.models.build import build_model
from maas_ray.models.params import ResnetSpec
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.spec import parse_spec

SMALL = {"width": 8}


def resnet(shape: tuple[int, ...], params: dict | None = None, num_outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(name="resnet", params=SMALL | (params or {})), Row(shape), num_outputs)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_it_learns_where_a_bright_spot_is(norm: str) -> None:
    torch.manual_seed(0)
    images, target = torch.randn(16, 12, 12), torch.arange(16) % 2
    images[target == 0, 2:5, 2:5] += 3
    images[target == 1, 8:11, 8:11] += 3
    model = resnet((12, 12), {"norm": norm}, num_outputs=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4


@pytest.mark.parametrize(
    ("shape", "params", "pixels"),
    [
        ((28, 28), {}, (28, 4)),
        ((3, 32, 32), {"depth": 34}, (32, 4)),
        ((33, 31, 3), {"norm": "batch"}, (33, 5)),
        ((1, 64, 64), {"depth": 50}, (64, 8)),
        ((3, 65, 65), {}, (17, 3)),
        ((1, 1), {}, (1, 1)),
    ],
)
def test_small_images_keep_their_resolution_in_the_stem_and_any_size_is_accepted(
    shape: tuple[int, ...], params: dict, pixels: tuple[int, int]
) -> None:
    model = resnet(shape, params).eval()
    images = torch.randn(2, *shape)
    stem = model[:2](images)
    before_pool = model[:-3](images)
    assert (stem.shape[2], before_pool.shape[2]) == pixels
    assert model(images).shape == (2, 3)
    assert model(images[:0]).shape == (0, 3)


@pytest.mark.parametrize(("depth", "num_parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_for_large_images_it_has_as_many_parameters_as_the_original(depth: int, num_parameters: int) -> None:
    spec = ModelSpec(name="resnet", params={"depth": depth, "norm": "batch"})
    model = build_model(spec, Row((3, 65, 65)), 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_float64_stays_float64_and_every_parameter_gets_a_gradient() -> None:
    model = resnet((16, 16)).double()
    logits = model(torch.randn(2, 16, 16, dtype=torch.float64))
    assert logits.dtype == torch.float64
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_names_of_layers_are_stable() -> None:
    names = [name for name, _ in resnet((8, 8)).named_children()]
    blocks = [f"stage_{stage}_block_{i}" for stage in range(4) for i in range(2)]
    assert names == ["layout", "stem", *blocks, "pool", "dropout", "head"]


@pytest.mark.fault
def test_it_is_exported_to_onnx_with_the_same_logits() -> None:
    column = TensorColumn(name="image", shape=(3, 16, 16), scale=(2.0,))
    features = Features(columns=(column,), task="classification", target="y", labels=("a", "b", "c"))
    model = resnet(column.shape)
    graph, _ = export(model, features)
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    found = onnxruntime.InferenceSession(graph).run(None, {"image": images})[0]
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(images) / 2).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_rows_that_are_not_images_are_refused() -> None:
    with pytest.raises(ModelError, match="resnet needs images, .* use the model 'mlp'"):
        resnet((64,))


@pytest.mark.parametrize(
    ("params", "message"), [({"depth": 20}, "18, 34 or 50"), ({"norm": "layer"}, "norm"), ({"width": 4}, "width")]
)
def test_a_wrong_description_is_refused(params: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(ResnetSpec, params)
