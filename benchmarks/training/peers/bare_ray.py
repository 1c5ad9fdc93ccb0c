"""Bare Ray Train, as its documentation shows it: `TorchTrainer`, `prepare_model`, a loop. For the time to its first step.

    python -m benchmarks.training.peers.bare_ray --spec run.json --digest <data> --out out.json

Joins the cluster of the environment (RAY_ADDRESS and the rest of a cluster's env.sh).
"""

import argparse
import json
import time
from pathlib import Path

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, str]) -> None:
    from maas_ray.data.loading.loader import Loader
    from maas_ray.data.loading.open import open_rows
    from maas_ray.data.loading.preprocess import Preprocess
    from maas_ray.data.stored.dataset import open_dataset
    from maas_ray.models.build import build_model
    from maas_ray.store.objects import open_store
    from maas_ray.train.spec.train import TrainSpec

    spec = TrainSpec.model_validate_json(config["spec"])
    context = ray.train.get_context()
    dataset = open_dataset(open_store(spec.storage), config["digest"])
    features = dataset.features
    model = ray.train.torch.prepare_model(
        build_model(spec.model, features.row, features.num_outputs, per_token=features.is_per_token)
    )
    preprocess = Preprocess(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.optimizer.lr)
    loader = Loader.over(
        open_rows(dataset, "train"),
        seed=spec.seed,
        global_batch=spec.batch.global_size,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
    )
    (batch,) = loader.load(0, spec.stop_position(dataset.num_rows["train"]))
    logits = model(preprocess(*batch.columns))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch.target.flatten())
    loss.backward()
    optimizer.step()
    dist.all_reduce(loss.detach())
    if context.get_world_rank() == 0:
        Path(config["out"]).write_text(json.dumps({"done": {"1": time.time()}}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--digest", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    ray.init(logging_level="warning", log_to_driver=False)
    text = options.spec.read_text()
    workers = json.loads(text)["workers"]
    TorchTrainer(
        train,
        train_loop_config={"spec": text, "digest": options.digest, "out": str(options.out)},
        scaling_config=ScalingConfig(num_workers=workers["count"], resources_per_worker={"CPU": workers["cpus"]}),
        run_config=RunConfig(storage_path=str(options.out.parent / "ray")),
    ).fit()


if __name__ == "__main__":
    main()
