"""Which models have a Hugging Face format."""

from torch import nn

from maas_ray.models.families.decoder import Decoder
from maas_ray.models.hugging_face.transformers_model import HuggingFaceModel


def has_hf_format(net: nn.Module) -> bool:
    """Whether a model can be written as a folder that Transformers reads."""
    return isinstance(net, Decoder | HuggingFaceModel)
