"""Quarantine: refuses, for a limited time, requests whose values ended the engine's process twice.

There is one per model version: the same values may be harmless to another version. Values are stored as digests.
"""

from collections.abc import Mapping

from blake3 import blake3

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.strings import encode
from maas_ray.errors import RequestQuarantined

KEEP_S = 600.0
"""Seconds for which the same values are refused."""
MAX_ENTRIES = 1024
"""Maximum number of remembered requests; above it the oldest is dropped, and can end two processes again."""


class Quarantine:
    """A bounded table of digests; times are seconds on the caller's clock."""

    def __init__(self) -> None:
        self.is_active = False
        """Whether any values are in quarantine, so that every request must be checked."""
        self._until_s: dict[bytes, float] = {}

    def add(self, inputs: Mapping[str, Array], now_s: float) -> None:
        """Refuses these values from now on, for `KEEP_S`."""
        self.is_active = True
        self._until_s[_digest(inputs)] = now_s + KEEP_S
        if len(self._until_s) > MAX_ENTRIES:
            del self._until_s[next(iter(self._until_s))]

    def check(self, inputs: Mapping[str, Array], now_s: float, name: str) -> None:
        """Refuses a request with values that are in quarantine; ends the quarantine of those whose time is over.

        Args:
            inputs: tensors of the request.
            now_s: current time.
            name: name of the model version, for the message.

        Raises:
            RequestQuarantined: these values are in quarantine.
        """
        self._until_s = {digest: until_s for digest, until_s in self._until_s.items() if until_s > now_s}
        self.is_active = bool(self._until_s)
        if self.is_active and _digest(inputs) in self._until_s:
            raise self.refusal(name)

    def refusal(self, name: str) -> RequestQuarantined:
        """Returns the error for a sender of such values."""
        return RequestQuarantined(
            f"these values ended the process of {name} twice, once while they ran alone; they are refused for "
            f"{KEEP_S:.0f} s; send other values, or have the model fixed"
        )


def _digest(inputs: Mapping[str, Array]) -> bytes:
    digest = blake3()
    for name, array in sorted(inputs.items()):
        digest.update(f"{name!r} {array.dtype.char} {array.shape} ".encode("utf-8", "surrogateescape"))
        if array.dtype == object:
            for element in array.ravel().tolist():
                text = encode(element)
                digest.update(len(text).to_bytes(8, "little") + text)
        else:
            digest.update(array.tobytes())
    return digest.digest()
