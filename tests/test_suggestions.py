"""The hint of a message about an unknown name: near names, and the list or the number of all names."""

import pytest

from maas_ray.suggestions import known_names

MANY = [f"model-{number}" for number in range(300)]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("x", [], "there are no models yet"),
        ("cat", ["digits"], "models: digits"),
        ("digit", ["cats", "digits"], "did you mean 'digits'? models: cats, digits"),
        ("zebra", MANY, "there are 300 models, which `maas-ray models` lists"),
        ("modle-299", ["iris", *MANY[-1:], *MANY[:100]], "did you mean 'model-299'"),
    ],
    ids=["none", "one", "near", "many", "many and near"],
)
def test_known_names(name: str, known: list[str], expected: str) -> None:
    assert known_names(name, known, "models", "maas-ray models").startswith(expected)


def test_ten_thousand_names_are_not_listed() -> None:
    assert len(known_names("model-x", [f"model-{number}" for number in range(10_000)], "models")) < 200
