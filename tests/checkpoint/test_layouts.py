"""A checkpoint saved under any layout loads under any other, bit for bit, with little more reading than necessary."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from maas_ray.checkpoint.catalog import open_checkpoint, verify
from maas_ray.checkpoint.collectives import saving_group
from maas_ray.checkpoint.load import load_into, read_tensors
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.store.objects import open_store
from tests.checkpoint.states import LAYOUTS, is_equal, local_values, spread
from tests.support.ranks import run_ranks

SHORT = ("plain", "rows 2", "columns 4", "rows 2 x columns 2")


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        "model.even": torch.randn(512, 512),
        "model.uneven": torch.randn(501, 503),
        "model.fewer_rows_than_ranks": torch.randn(3, 5),
        "model.vector": torch.randn(30011, dtype=torch.float64),
        "optimizer.step": torch.tensor(3.0),
    }


def _clear(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        values = local_values(tensor)
        if values is not None:
            values.zero_()


def _every_pair(rank: int, root: str, names: tuple[str, ...]) -> dict[str, float]:
    """Saves under each layout and loads it under all; returns bytes read / bytes needed over all ranks."""
    store = open_store(root)
    group = saving_group(30)
    truth = _tensors()
    ratios = {}
    for number, first in enumerate(names):
        committed = save(store, "saved", Snapshot(number, 0, spread(truth, first)), group)
        for second in names:
            held = spread(truth, second)
            wanted = {name: local_values(tensor) for name, tensor in spread(truth, second).items()}
            _clear(held)
            # A rank outside of the mesh asks for nothing; one inside for its own part.
            count = torch.tensor([load_into(committed, held), 0], dtype=torch.int64)
            for name, tensor in held.items():
                values = local_values(tensor)
                if values is not None:
                    assert torch.equal(values, wanted[name]), (first, second, name)
                    count[1] += values.numel() * values.element_size()
            dist.all_reduce(count, group=group)
            ratios[f"{first} -> {second}"] = float(count[0] / count[1])
    sizes = {f"bytes written of {step}": value for step, value in _written(rank, root, group).items()}
    dist.barrier(group)
    return {**ratios, **sizes}


def _written(rank: int, root: str, group: dist.ProcessGroup | None) -> dict[int, float]:
    """Bytes that this rank wrote of the same state twice, and once of a layout that has it twice."""
    store = open_store(root)
    found = {}
    for step, layout in enumerate(("plain", "plain", "replicas 2 x rows 2")):
        committed = save(store, f"again{step}", Snapshot(0, 0, spread(_tensors(), layout)), group)
        sizes = [part.size for name, part in committed.parts.items() if name.startswith(f"{rank:05d}")]
        found[step] = float(sum(sizes))
    return found


def _ranks(directory: Path, names: tuple[str, ...]) -> tuple[Path, tuple[str, ...], list[dict[str, float]]]:
    return directory, names, run_ranks(_every_pair, 4, str(directory), names)


@pytest.fixture(scope="module", params=[pytest.param(each, marks=pytest.mark.fault) for each in ("few", "all")])
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...], list[dict[str, float]]]:
    """One start of four processes for all tests below: it takes longer than what they do."""
    return _ranks(tmp_path_factory.mktemp("store"), SHORT if request.param == "few" else tuple(LAYOUTS))


def test_every_layout_is_loaded_under_every_other_bit_for_bit_from_few_bytes(ran) -> None:
    directory, names, (found, *_) = ran
    ratios = {pair: ratio for pair, ratio in found.items() if "->" in pair}
    assert len(ratios) == len(names) ** 2
    assert {pair: ratio for pair, ratio in ratios.items() if not 1 <= ratio <= 1.1} == {}
    store = open_store(str(directory))
    for number in range(len(names)):
        committed = open_checkpoint(store, "saved", number)
        assert verify(committed) == []
        assert is_equal(read_tensors(committed, ""), _tensors())


def test_replicated_tensors_are_written_once_by_alternating_ranks_and_deterministically(ran) -> None:
    directory, _, by_rank = ran
    total = sum(tensor.numel() * tensor.element_size() for tensor in _tensors().values())
    for step in range(3):
        sizes = [found[f"bytes written of {step}"] for found in by_rank]
        assert total < sum(sizes) < 1.1 * total
        assert max(sizes) < 1.3 * total / 4, "the work is spread evenly"
    store = open_store(str(directory))
    first, again = (open_checkpoint(store, f"again{step}") for step in (0, 1))
    assert first.meta["index"] == again.meta["index"]
    assert {part.sha256 for part in first.parts.values()} == {part.sha256 for part in again.parts.values()}


def _torch_parallel(rank: int, root: str) -> None:
    """What torch's own FSDP2 and tensor parallelism make of a model, saved and loaded under the other of the two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def build(dp: int, tp: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(90, 204), torch.nn.GELU(), torch.nn.Linear(204, 90))
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        if tp > 1:
            parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if dp > 1:
            fully_shard(net, mesh=mesh["dp"])
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(4, 90)).square().sum().backward()
        optimizer.step()
        return net, optimizer

    def state(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        names = {parameter: name for name, parameter in net.named_parameters()}
        moments = {
            f"optimizer.{names[parameter]}.{key}": value
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }
        return {**{f"model.{name}": value for name, value in net.state_dict().items()}, **moments}

    store = open_store(root)
    group = saving_group(30)
    states = {layout: state(*build(*layout)) for layout in ((4, 1), (1, 4), (2, 2))}
    for number, (layout, tensors) in enumerate(states.items()):
        committed = save(store, "saved", Snapshot(number, 0, tensors), group)
        whole = read_tensors(committed, "")
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole[name], full.detach()), (layout, name)
        for other in states:
            held = state(*build(*other))
            _clear(held)
            load_into(committed, held)
            for name, tensor in held.items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                assert torch.equal(whole[name], full.detach()), (layout, other, name)


@pytest.mark.fault
def test_tensors_sharded_by_torch_are_saved_and_loaded_under_each_layout(tmp_path: Path) -> None:
    run_ranks(_torch_parallel, 4, str(tmp_path))
