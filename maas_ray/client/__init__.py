"""A client of served models: `Client` and `AsyncClient` over the Open Inference Protocol v2. Needs no Ray and no torch."""

from maas_ray.client.asynchronous import AsyncClient
from maas_ray.client.messages import Prediction, Tensor
from maas_ray.client.retries import Retries
from maas_ray.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "Prediction", "Retries", "Tensor"]
