"""Requests that have ended an engine's process twice, by a digest of their values, for a while. Knows no queue.

One per model version: the same values may be harmless to another version.
"""

from collections.abc import Mapping

from blake3 import blake3

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.strings import encode
from maas_ray.errors import RequestQuarantined

KEEP_S = 600.0
"""How long the same values are refused."""
MAX_ENTRIES = 1024
"""Requests that are remembered; past it the oldest is forgotten, and costs two processes again."""


class Quarantine:
    """A bounded table; times are those of the caller's clock, in seconds."""

    def __init__(self) -> None:
        self._until_s: dict[bytes, float] = {}

    def add(self, inputs: Mapping[str, Array], now_s: float) -> None:
        """Refuses these values from now on, for `KEEP_S`."""
        self._until_s[_digest(inputs)] = now_s + KEEP_S
        if len(self._until_s) > MAX_ENTRIES:
            del self._until_s[next(iter(self._until_s))]

    def check(self, inputs: Mapping[str, Array], now_s: float, name: str) -> bool:
        """Looks at a request.

        Args:
            inputs: its tensors.
            now_s: the time.
            name: of the model version, for the message.

        Returns:
            Whether further requests must be looked at: whether anything is in quarantine.

        Raises:
            RequestQuarantined: these very values are.
        """
        self._until_s = {digest: until_s for digest, until_s in self._until_s.items() if until_s > now_s}
        if not self._until_s:
            return False
        if _digest(inputs) in self._until_s:
            raise self.refusal(name)
        return True

    def refusal(self, name: str) -> RequestQuarantined:
        """What the sender of such values reads."""
        return RequestQuarantined(
            f"these values ended the process that runs {name} twice, once while they ran alone; they are refused for "
            f"{KEEP_S:.0f} s, send other values, or have the model repaired"
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
