"""Compares sizes that inputs share by name in the graph, for messages of failed runs: names are only hints."""

from collections.abc import Mapping, Sequence

from maas_ray.bundle.datatypes import Array


def disagreement(declared: Mapping[str, Sequence[int | str | None]], inputs: Mapping[str, Array]) -> str:
    """Describes the named size in which the inputs differ; empty if there is none.

    Args:
        declared: shapes in the graph, with variable sizes by name.
        inputs: the tensors of a run, without omitted optional ones.

    Returns:
        For instance `inputs 'ids' (axis 1) and 'mask' (axis 1) share the size 'seq', but have 4 and 3`.
    """
    first: dict[str, tuple[str, int, int]] = {}
    for name, shape in declared.items():
        array = inputs.get(name)
        if array is None or array.ndim != len(shape):
            continue
        for axis, (size, label) in enumerate(zip(array.shape, shape, strict=True)):
            if not isinstance(label, str):
                continue
            other, other_axis, other_size = first.setdefault(label, (name, axis, size))
            if size != other_size:
                return (
                    f"inputs {other!r} (axis {other_axis}) and {name!r} (axis {axis}) share the size {label!r}, but "
                    f"have {other_size} and {size}"
                )
    return ""
