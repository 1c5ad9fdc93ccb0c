"""Clients of served models over the Open Inference Protocol v2: `Client`, `AsyncClient`. Need neither Ray nor torch."""

from maas_ray.client.asynchronous import AsyncClient
from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.client.prediction import Prediction
from maas_ray.client.retries import Retries
from maas_ray.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "ModelDescription", "Prediction", "Retries", "Tensor"]
