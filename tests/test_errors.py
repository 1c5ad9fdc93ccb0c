import pickle
from collections.abc import Iterator

import pytest

from maas_ray import errors
from maas_ray.errors import MaasError, Overloaded


def _tree(root: type[MaasError] = MaasError) -> Iterator[type[MaasError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


CLASSES = [kind for kind in _tree() if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_between_processes(kind: type[MaasError]) -> None:
    error = kind("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.args) == (str(error), error.args)
    assert str(copy) == "what happened"


def test_a_retry_time_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(Overloaded("the queue is full", 2.5)))
    assert (str(copy), copy.retry_after_s) == ("the queue is full", 2.5)


def test_codes_are_unique() -> None:
    codes = [kind.__dict__.get("code") for kind in CLASSES]
    assert None not in codes
    assert len(set(codes)) == len(codes)


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    lines = [
        line for line in (errors.__doc__ or "").splitlines() if "── " in line or line.strip().startswith("MaasError")
    ]
    drawn = [line.split("── ")[-1].split()[0] for line in lines]
    assert drawn == [kind.__name__ for kind in CLASSES]
