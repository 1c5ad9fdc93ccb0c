"""Evaluates a checkpoint of a run on held-out data, with the decision threshold that the run chooses."""

from maas_ray.store.objects import ObjectStore
from maas_ray.train.evaluation.evaluate import DEFAULT_THRESHOLD
from maas_ray.train.records.checkpoint_selector import Which
from maas_ray.train.records.runs import Runs
from maas_ray.train.validation.load_model import Evaluation, Weights, evaluate_trained, load_trained
from maas_ray.train.validation.threshold import choose_threshold


def evaluate_run(
    store: ObjectStore, run: str, split: str = "test", step: Which = None, weights: Weights | None = None
) -> Evaluation:
    """Evaluates a checkpoint on a split and records the metrics in the run's log; for arguments see `load_trained`.

    Raises:
        NotFound: the run or the checkpoint does not exist.
        DataError: the data does not have this split.
    """
    trained = load_trained(store, run, step, weights=weights)
    threshold = choose_threshold(trained)
    evaluation = evaluate_trained(trained, split, threshold=DEFAULT_THRESHOLD if threshold is None else threshold.value)
    event = {"split": split, "step": evaluation.step, "weights": trained.weights, "metrics": evaluation.metrics}
    Runs(store).record(run, {"type": "evaluated", **event})
    return evaluation
