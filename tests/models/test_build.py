import pytest
import torch
from torch import nn

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.build import build_model
from maas_ray.models.families.layers import ACTIVATIONS
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.spec import parse_spec

HERE = "tests.models.test_build"


class Affine(nn.Module):
    """Takes what build_model offers, and one parameter of its own."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, hidden: int = 4) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_shape[0], hidden)
        self.output = nn.Linear(hidden, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(x).relu())


class Lazy(nn.Sequential):
    def __init__(self, num_outputs: int) -> None:
        super().__init__(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(num_outputs))


class Wide(Affine):
    """Gives one logit too many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(super().forward(x), (0, 1))


class Pair(Affine):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Double(Affine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


class Picky(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        raise ValueError(f"rate {rate} is not allowed")


def not_a_class() -> None: ...


@pytest.mark.parametrize("name", ["mlp", "convnet"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_family_learns_with_each_activation(name: str, activation: str) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(name=name, params={"size": 1, "activation": activation, "dropout": 0.1})
    model = build_model(spec, Row((1, 8, 8)), 3)
    assert model.training
    images, target = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "params", "shape"),
    [
        ("mlp", {}, (5,)),
        ("mlp", {"norm": "layer"}, (2, 3, 4)),
        ("mlp", {"norm": "batch", "size": 3}, (5,)),
        ("convnet", {}, (28, 28)),
        ("convnet", {"norm": "batch"}, (3, 32, 32)),
        ("convnet", {"norm": "none"}, (32, 32, 3)),
        ("convnet", {"size": 3}, (1, 8, 8)),
        ("convnet", {"size": 4}, (1, 5, 3)),
        ("convnet", {"size": 1}, (1, 1)),
    ],
)
def test_a_family_gives_a_logit_per_output_for_any_number_of_rows(
    name: str, params: dict, shape: tuple[int, ...]
) -> None:
    model = build_model(ModelSpec(name=name, params=params), Row(shape), 7).eval()
    for num_rows in (0, 1, 6):
        assert model(torch.randn(num_rows, *shape)).shape == (num_rows, 7)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_an_empty_micro_batch_gives_zero_gradients(name: str) -> None:
    model = build_model(ModelSpec(name=name, params={"dropout": 0.2}), Row((4, 4)), 2)
    model(torch.zeros(0, 4, 4)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_size_dial_sets_depth_and_width_of_the_mlp() -> None:
    model = build_model(ModelSpec(name="mlp", params={"size": 3}), Row((5,)), 2)
    sizes = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [(5, 192), (192, 192), (192, 192), (192, 2)]


def test_the_size_dial_sets_stages_and_channels_of_the_convnet() -> None:
    model = build_model(ModelSpec(name="convnet", params={"size": 2}), Row((3, 8, 8)), 2)
    sizes = [(layer.in_channels, layer.out_channels) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert sizes == [(3, 32), (32, 32), (32, 64), (64, 64)]


def test_channels_last_images_give_the_logits_of_the_same_images_with_channels_first() -> None:
    torch.manual_seed(0)
    first = build_model(ModelSpec(name="convnet"), Row((3, 9, 8)), 4).eval()
    last = build_model(ModelSpec(name="convnet"), Row((9, 8, 3)), 4).eval()
    last.load_state_dict(first.state_dict())
    images = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(last(images.permute(0, 2, 3, 1)), first(images))


@pytest.mark.parametrize("shape", [(64,), (1, 3, 8, 8), ()])
def test_a_convnet_refuses_rows_that_are_not_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"convnet needs images, .* these rows have the shape"):
        build_model(ModelSpec(name="convnet"), Row(shape), 2)


@pytest.mark.parametrize("name", ["mlp", f"{HERE}:Affine"])
@pytest.mark.parametrize("initialization", ["default", "orthogonal"])
def test_the_same_seed_builds_the_same_model(name: str, initialization: str) -> None:
    spec = ModelSpec(name=name, initialization=initialization)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model(spec, Row((6,)), 3).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_class_by_import_path_gets_its_parameters_and_the_sizes_of_the_data() -> None:
    model = build_model(ModelSpec(name=f"{HERE}:Affine", params={"hidden": 9}), Row((6,)), 3)
    assert isinstance(model, Affine)
    assert (model.hidden.in_features, model.hidden.out_features, model.output.out_features) == (6, 9, 3)


def test_a_class_that_names_no_sizes_gets_only_its_parameters() -> None:
    spec = ModelSpec(name="torch.nn:Linear", params={"in_features": 6, "out_features": 3})
    assert isinstance(build_model(spec, Row((6,)), 3), nn.Linear)


def test_lazy_layers_are_materialized_before_they_are_initialized() -> None:
    model = build_model(ModelSpec(name=f"{HERE}:Lazy", initialization="he_normal"), Row((6,)), 3)
    assert model[0].weight.shape == (5, 6)
    assert not model[0].bias.any()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("no_such_package.models:Net", {}, "cannot be imported on .*: ModuleNotFoundError.*working directory"),
        (f"{HERE}:Affin", {}, "did you mean 'Affine'"),
        (f"{HERE}:not_a_class", {}, "not a subclass of torch.nn.Module"),
        ("fractions:Fraction", {}, "not a subclass of torch.nn.Module"),
        (f"{HERE}:Affine", {"hiden": 3}, "no parameter 'hiden'; did you mean 'hidden'"),
        ("torch.nn:Linear", {"in_features": 6}, "needs the parameters out_features"),
        (
            "torch.nn:Linear",
            {"in_features": 5, "out_features": 3},
            r"fails on float32 rows of the shape \[6\]",
        ),
        (f"{HERE}:Picky", {"rate": 2.0}, "could not be built with rate=2.0: ValueError: rate 2.0 is not allowed"),
        (f"{HERE}:Wide", {}, r"maps \[2, 6\] to \[2, 4\]; the data needs \[2, 3\]"),
        (f"{HERE}:Pair", {}, "returns a tuple"),
        (f"{HERE}:Double", {}, "torch.float64"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_with_the_reason(name: str, params: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelSpec(name=name, params=params), Row((6,)), 3)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"name": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'"),
        ({"name": "transformer"}, "models: mlp, convnet, "),
        ({"name": "package.Net"}, "import path 'package.module:Class'"),
        ({"name": "mlp", "params": {"activaton": "relu"}}, "unknown key 'activaton'; did you mean 'activation'"),
        ({"name": "mlp", "params": {"size": 0}}, "size"),
        ({"name": "random_forst"}, "did you mean 'random_forest'"),
        ({"name": "svm", "params": {"kernal": "rbf"}}, "unknown key 'kernal'; did you mean 'kernel'"),
        ({"name": "random_forest", "params": {"n_estimators": 5}}, "n_estimators is called size here; use size: 5"),
        ({"name": "convnet", "params": {"norm": "layer"}}, "norm"),
        ({"name": "mlp", "initialization": "xavier"}, "xavier_uniform"),
    ],
)
def test_a_wrong_description_is_refused_when_the_spec_is_read(document: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(ModelSpec, document)
