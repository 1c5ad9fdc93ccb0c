import pytest
import torch

from maas_ray.errors import NotFound, ObjectCorrupt
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.checkpoint import (
    MODEL,
    OPTIMIZER,
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    open_checkpoint,
    pin,
    retain,
    save_checkpoint,
)

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
}


def _trained(optimizer: str = "adamw", num_steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    chosen = OPTIMIZERS[optimizer](net.parameters())
    for _ in range(num_steps):
        _step(net, chosen)
    return net, chosen


def _step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.linspace(0, 1, 24).reshape(8, 3)).square().sum().backward()
    optimizer.step()


def _state(net: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int = 2) -> TrainingState:
    history = [{"step": 1, "loss": 0.25, "lr": 0.1}]
    return TrainingState(
        step, step * 8, net.state_dict(), optimizer.state_dict(), {"last_epoch": step}, {"seed": 5}, history
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_from_a_loaded_state_bit_for_bit(store: ObstoreStore, optimizer: str) -> None:
    net, chosen = _trained(optimizer)
    save_checkpoint(store, "r", _state(net, chosen))
    _step(net, chosen)

    fresh, its_optimizer = _trained(optimizer, num_steps=0)
    state = load_checkpoint(store, "r")
    fresh.load_state_dict(dict(state.model))
    its_optimizer.load_state_dict(dict(state.optimizer))
    _step(fresh, its_optimizer)
    assert (state.step, state.cursor, state.schedule, state.rng) == (2, 16, {"last_epoch": 2}, {"seed": 5})
    assert state.history == [{"step": 1, "loss": 0.25, "lr": 0.1}]
    for name, value in net.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_tied_weights_can_be_saved(file_store: ObstoreStore) -> None:
    net, optimizer = _trained()
    net.tied = net[0].weight
    save_checkpoint(file_store, "r", _state(net, optimizer))
    model = load_checkpoint(file_store, "r").model
    assert torch.equal(model["tied"], model["0.weight"])


def test_the_same_step_saved_again_with_the_same_weights_is_kept_and_with_others_refused(
    file_store: ObstoreStore,
) -> None:
    net, optimizer = _trained()
    first = save_checkpoint(file_store, "r", _state(net, optimizer))
    assert save_checkpoint(file_store, "r", _state(net, optimizer)).digest == first.digest
    _step(net, optimizer)
    with pytest.raises(ObjectCorrupt, match="committed with other weights"):
        save_checkpoint(file_store, "r", _state(net, optimizer))
    assert open_checkpoint(file_store, "r").digest == first.digest


@pytest.mark.parametrize("part", [MODEL, OPTIMIZER])
def test_a_flipped_byte_is_refused_by_name(store: ObstoreStore, part: str) -> None:
    key = save_checkpoint(store, "r", _state(*_trained())).parts[part].key
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(ObjectCorrupt) as caught:
        load_checkpoint(store, "r")
    assert key in str(caught.value)


def test_retention_keeps_the_newest_and_the_pinned_and_counts_committed_ones_only(file_store: ObstoreStore) -> None:
    state = _trained()
    for step in range(1, 7):
        save_checkpoint(file_store, "r", _state(*state, step=step))
    for step in (5, 6):  # two attempts that died before their manifest
        file_store.delete([f"runs/r/checkpoints/{step:010d}/manifest.json"])
    pin(file_store, "r", 2, "published")
    assert retain(file_store, "r", keep_last=1) == [1, 3]
    assert list_checkpoints(file_store, "r") == [2, 4]
    assert retain(file_store, "r", keep_last=1) == []


def test_what_is_not_there_is_named_with_what_is(file_store: ObstoreStore) -> None:
    with pytest.raises(NotFound, match="no committed checkpoint; there is: none"):
        load_checkpoint(file_store, "r")
    save_checkpoint(file_store, "r", _state(*_trained()))
    with pytest.raises(NotFound, match="no committed checkpoint of step 9; there is: 2"):
        load_checkpoint(file_store, "r", 9)
    with pytest.raises(NotFound, match="of step 9"):
        pin(file_store, "r", 9, "no such step")
