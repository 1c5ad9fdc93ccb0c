"""Names of columns that can be inputs of a graph. Imports nothing heavy: a driver checks them before any work."""

from maas_ray.data.spec.features import Features
from maas_ray.errors import BundleError


def refuse_names(features: Features) -> None:
    """Raises BundleError if a column has no name, or two have the same; a graph has one namespace."""
    names = [column.name for column in features.columns]
    if "" not in names and len(set(names)) == len(names):
        return
    twice = sorted({name for name in names if names.count(name) > 1})
    what = f"{', '.join(map(repr, twice))} is the name of several columns" if twice else "a column has no name"
    raise BundleError(
        f"{what}, but the inputs of a graph need distinct names that are not empty: rename it in the file, or list the other "
        f"columns in data.features; the columns: {', '.join(map(repr, names))}"
    )
