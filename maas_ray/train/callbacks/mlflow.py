"""MLflow: parameters, metrics and the end of a run on a tracking server or in a local database."""

from typing import Any

from maas_ray.errors import SpecError
from maas_ray.train.callbacks.base import Callback, EndReason, RunContext
from maas_ray.train.loop.progress import Progress

RUN_TAG = "maas_ray.run"
MAX_PARAM = 500
"""Number of characters of a parameter's value that every tracking server accepts."""


class MLflow(Callback):
    """Logs to MLflow (`pip install 'maas-ray[mlflow]'`). A run that is resumed continues its MLflow run.

    Args:
        tracking_uri: URI of the server or database, such as `http://mlflow:5000` or `sqlite:////data/mlflow.db`; by
            default MLFLOW_TRACKING_URI, else the file mlflow.db in the working directory.
        experiment: name of the experiment; created if missing.
    """

    def __init__(self, tracking_uri: str | None = None, experiment: str = "maas-ray") -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise SpecError(f"callbacks: MLflow is not installed ({error}); pip install 'maas-ray[mlflow]'") from error
        self._client: Any = MlflowClient(tracking_uri=tracking_uri)
        self._experiment = experiment

    def on_begin(self, context: RunContext) -> None:
        client = self._client
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found is not None else client.create_experiment(self._experiment)
        ours = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{context.run}'", max_results=1)
        if ours and context.first_step:
            self._run = ours[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return
        self._run = client.create_run(experiment, tags={RUN_TAG: context.run}, run_name=context.run).info.run_id
        for name, value in _flat(context.spec.model_dump(mode="json")):
            client.log_param(self._run, name, str(value)[:MAX_PARAM])

    def on_step(self, progress: Progress) -> None:
        for name in ("loss", "lr", "samples_per_s", "tokens_per_s", "mfu"):
            if (value := getattr(progress, name)) is not None:
                self._client.log_metric(self._run, name, value, step=progress.step)

    def on_validation(self, progress: Progress) -> None:
        step = progress.step if progress.of_step is None else progress.of_step
        for name, value in progress.metrics.items():
            self._client.log_metric(self._run, f"validation_{name}", value, step=step)

    def on_end(self, reason: EndReason) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[reason]
        self._client.set_terminated(self._run, status)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [] if value is None else [(path, value)]
    return [pair for name, each in value.items() for pair in _flat(each, f"{path}.{name}" if path else name)]
