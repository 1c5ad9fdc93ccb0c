"""The plain script: one training loop under torchrun, with torch alone.

    torchrun --nproc-per-node 2 -m benchmarks.training.peers.plain --spec run.json --digest <data> --out out.json

The same body as the run it is compared with: its model, its rows in its order, its optimizer, schedule, clipping and
threads come from the same spec. What is missing is what a run adds: Ray, restarts, exact resume, checkpoints, records.
Writes the times at which step 1 and each logged step were done on all ranks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.models.build import build_model
from maas_ray.store.objects import open_store
from maas_ray.train.optim.optimizer import build_optimizer
from maas_ray.train.optim.schedule import build_schedule
from maas_ray.train.spec.train import TrainSpec


def main() -> None:
    options = _options()
    spec = TrainSpec.model_validate_json(options.spec.read_text())
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(spec.workers.cpus)
    dataset = open_dataset(open_store(spec.storage), options.digest)
    features = dataset.features
    torch.manual_seed(spec.seed)
    net = build_model(spec.model, features.row, features.num_outputs, per_token=features.is_per_token)
    model = _distributed(net, options.fsdp)
    optimizer = build_optimizer(spec.optimizer, net)
    total_steps = spec.total_steps(dataset.num_rows["train"])
    schedule = build_schedule(spec.schedule, optimizer, total_steps)
    preprocess = Preprocess(features)
    loader = Loader.over(
        open_rows(dataset, "train"), seed=spec.seed, global_batch=spec.batch.global_size, rank=rank, world=world
    )
    stop = spec.stop_position(dataset.num_rows["train"])
    model.train()
    done: dict[int, float] = {}
    for step in range(total_steps):
        (batch,) = loader.load(step * spec.batch.global_size, stop)
        optimizer.zero_grad(set_to_none=True)
        logits = model(preprocess(*batch.columns))
        loss = functional.cross_entropy(logits.flatten(0, -2), batch.target.flatten())
        loss.backward()
        if spec.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), spec.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step == 0 or (step + 1) % spec.log_every == 0:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            done[step + 1] = time.time()
            if rank == 0:
                print(f"step {step + 1} loss {float(mean):.4f}")
    if rank == 0:
        options.out.write_text(json.dumps({"done": done, "loss": float(mean)}))
    dist.barrier()  # gloo aborts a rank whose neighbour leaves in the middle of an answer
    dist.destroy_process_group()


def _distributed(net: nn.Module, is_sharded: bool) -> nn.Module:
    if not is_sharded:
        return DistributedDataParallel(net)
    from torch.distributed.fsdp import fully_shard

    for name, layer in net.named_children():
        if name.startswith("block"):
            fully_shard(layer)
    return fully_shard(net)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True, help="the TrainSpec as JSON, with an absolute store")
    parser.add_argument("--digest", required=True, help="the prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    return parser.parse_args()


if __name__ == "__main__":
    main()
