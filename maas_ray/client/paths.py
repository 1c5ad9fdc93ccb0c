"""URLs of a pool's models."""

from urllib.parse import quote


def model_url(base: str, model: str, version: int | None) -> str:
    """URL of a model, or of one version of it, below a pool's base URL."""
    path = f"{base}/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{version}"
