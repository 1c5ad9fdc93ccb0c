"""The type of NumPy arrays whose elements may be anything."""

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
