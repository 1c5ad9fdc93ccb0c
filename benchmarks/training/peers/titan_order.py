"""A decoder trained by a script composed in torchtitan's order. For where torchtitan itself does not run.

    torchrun --nproc-per-node 2 -m benchmarks.training.peers.titan_order --spec run.json --digest <data> --out out.json

torchtitan 0.3.0 (PyPI, with triton and the CPU build of torch 2.13) imports on a CPU machine and then ends in its
trainer's constructor: without an accelerator it takes the device to be CUDA (`torch.cuda.set_device`). So this composes
torch's parts as torchtitan/models/llama3/parallelize.py, distributed/fsdp.py and trainer.py do: FSDP2 on the embedding,
each block, norm and head together, and the root; gradients summed, not averaged; the loss of a step is the sum over
tokens divided by the global number of valid tokens, which is counted over the ranks in each step; gradients clipped by
their global norm; fused AdamW. Model, rows, order and threads are those of the spec.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.open import open_rows
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.models.build import build_model
from maas_ray.store.objects import open_store
from maas_ray.train.optim.schedule import build_schedule
from maas_ray.train.spec.train import TrainSpec

IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True, help="the TrainSpec as JSON, with an absolute store")
    parser.add_argument("--digest", required=True, help="the prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    spec = TrainSpec.model_validate_json(options.spec.read_text())
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(spec.workers.cpus)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    dataset = open_dataset(open_store(spec.storage), options.digest)
    features = dataset.features
    torch.manual_seed(spec.seed)
    net = build_model(spec.model, features.row, features.num_outputs, per_token=True)
    layers = dict(net.named_children())
    for wrapped in (layers["embedding"], *(layers[name] for name in layers if name.startswith("block"))):
        fully_shard(wrapped, mesh=mesh)
    fully_shard([layers["norm"], layers["head"]], mesh=mesh, reshard_after_forward=False)
    fully_shard(net, mesh=mesh)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=spec.optimizer.lr, betas=spec.optimizer.betas, weight_decay=spec.optimizer.weight_decay, fused=True
    )  # fmt: skip
    total_steps = spec.total_steps(dataset.num_rows["train"])
    schedule = build_schedule(spec.schedule, optimizer, total_steps)
    loader = Loader.over(
        open_rows(dataset, "train"), seed=spec.seed, global_batch=spec.batch.global_size, rank=rank, world=world
    )
    stop = spec.stop_position(dataset.num_rows["train"])
    net.train()
    done: dict[int, float] = {}
    for step in range(total_steps):
        (batch,) = loader.load(step * spec.batch.global_size, stop)
        optimizer.zero_grad()
        num_valid = (batch.target != IGNORED).sum()
        dist.all_reduce(num_valid)
        logits = net(*batch.columns)
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.target.flatten(), reduction="sum", ignore_index=IGNORED
        )
        loss = loss / num_valid
        loss.backward()
        if spec.max_grad_norm is not None:
            _clip(list(net.parameters()), spec.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step == 0 or (step + 1) % spec.log_every == 0:
            mean = loss.detach()
            dist.all_reduce(mean)
            done[step + 1] = time.time()
    if rank == 0:
        options.out.write_text(json.dumps({"done": done, "loss": float(mean)}))
    dist.barrier()  # gloo aborts a rank whose neighbour leaves in the middle of an answer
    dist.destroy_process_group()


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)


if __name__ == "__main__":
    main()
