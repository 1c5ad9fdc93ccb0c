"""The default location of the store: the environment is read here and nowhere else."""

import os

STORE_VARIABLE = "MAAS_RAY_STORE"
ENDPOINT_VARIABLE = "MAAS_RAY_ENDPOINT"
FALLBACK = ".maas-ray/store"
"""The store without $MAAS_RAY_STORE, relative to the working directory."""


def default_uri() -> str:
    """$MAAS_RAY_STORE, else `FALLBACK`; an empty variable counts as not set."""
    return os.environ.get(STORE_VARIABLE) or FALLBACK


def default_endpoint() -> str | None:
    """$MAAS_RAY_ENDPOINT, or None."""
    return os.environ.get(ENDPOINT_VARIABLE) or None
