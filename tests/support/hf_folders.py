"""Decoders of folders in Hugging Face's format, by the code that a run with `init.hf` starts with."""

from pathlib import Path

from maas_ray.models.families.decoder import Decoder, build_decoder
from maas_ray.models.hugging_face.llama_format import decoder_spec_of
from maas_ray.models.hugging_face.local import CONFIG, read_object_file
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.train.spec.init import InitSpec
from maas_ray.train.state.warm_start import open_start


def decoder_from(folder: Path) -> Decoder:
    """The model that a folder describes, with its weights. Raises `ModelError`, as `open_start` and `Start.check`."""
    spec, vocab_size = decoder_spec_of(read_object_file(folder / CONFIG), str(folder / CONFIG))
    net = build_decoder(spec, Row((spec.max_length or 1,), vocab_size), vocab_size)
    storage = StorageSpec(uri=str(folder))
    start = open_start(InitSpec(hf=str(folder)), open_store(storage), storage)
    weights = net.state_dict()
    start.check(ModelSpec(name="decoder", params=spec.model_dump(exclude_none=True)), weights)
    start.load(weights)
    return net
