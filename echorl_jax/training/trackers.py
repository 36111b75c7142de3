"""Experiment trackers: Weights & Biases and MLflow get each line of metrics.jsonl once.

``trackers.json`` in the workdir holds the id of the run there and the last step that was sent. A
resumed run goes on under the same id. It repeats the steps after its checkpoint with the same
values, and does not send them again.
"""

import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import flatten, to_dict
from echorl_jax.errors import one_line, require_package
from echorl_jax.files import read_json, read_jsonl, read_steps, replace_json
from echorl_jax.parallel import is_first

MARKS = "trackers.json"
# Metric that every evaluated step has.
EVALUATED = "eval/failed"
# Columns of the table of samples.
COLUMNS = ("step", "group", "prompt", "response", "reward", "correct", "reason", "advantage")
# MLflow takes these characters in the name of a metric.
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
# MLflow takes so many parameters at once, each of at most so many characters.
PARAMETERS, PARAMETER_CHARACTERS = 100, 500


class Tracker(Protocol):
    """A run at a tracker."""

    id: str  # names the run when it goes on
    last_step: int  # the last step that the tracker has, as far as it tells; else -1

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, file: Path) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Sender:
    """Sends a run's lines to one tracker, each once, and keeps count of them in the workdir."""

    def __init__(self, workdir: Path, name: str, tracker: Tracker, marks: Mapping[str, Any]):
        self._workdir, self._name, self._tracker = workdir, name, tracker
        self._sent, self._evaluated = marks.get("sent", -1), marks.get("evaluated", -1)
        if tracker.last_step > self._sent:  # the file is older than the tracker's record
            self._sent = self._evaluated = tracker.last_step
        self._behind = True
        self._save()

    def send(self, line: Mapping[str, Any] | None = None) -> None:
        """Sends the newest line of metrics.jsonl, or its evaluation if that alone is new.

        Without a line, and after a failure, it sends all that the tracker lacks. A tracker that
        cannot be reached costs a warning.
        """
        new = [] if line is None or self._behind else [line]
        self._behind = True
        try:
            for one in new or read_steps(self._workdir / "metrics.jsonl"):
                self._send(one)
            self._behind = False
        except Exception as error:  # each client has its own errors for an outage
            print(
                f"echorl: warning: {self._name} was not reached ({one_line(error)}); the next step "
                "tries again",
                file=sys.stderr,
            )

    def _send(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        new = step > self._sent
        evaluated = EVALUATED in line and step > self._evaluated
        if not new and not evaluated:
            return
        metrics = {
            name: float(value)
            for name, value in line.items()
            if value is not None and math.isfinite(value) and (new or name.startswith("eval/"))
        }
        self._tracker.log(step, {**metrics, "step": step})
        file = self._workdir / "samples" / f"step_{step:06d}.jsonl"
        if new and file.exists():
            self._tracker.samples(step, file)
        self._sent = max(step, self._sent)
        self._evaluated = step if evaluated else self._evaluated
        self._save()

    def _save(self) -> None:
        marks = {"id": self._tracker.id, "sent": self._sent, "evaluated": self._evaluated}
        file = self._workdir / MARKS
        replace_json(file, {**_read_marks(file), self._name: marks})

    def close(self, *, failed: bool) -> None:
        """Ends the run at the tracker."""
        self._tracker.close(failed=failed)


def require_trackers(config: Config) -> None:
    """Checks that the packages of the trackers are there, before anything slow begins.

    Raises:
      UserError: one is missing; names the key and the command that installs it.
    """
    if project := config.log.wandb_project:
        require_package("wandb", "wandb>=0.20", f"config.log.wandb_project = {project!r}")
    if experiment := config.log.mlflow_experiment:
        wanted_by = f"config.log.mlflow_experiment = {experiment!r}"
        require_package("mlflow", "mlflow-skinny>=3", wanted_by)


@contextmanager
def trackers(workdir: Path, config: Config) -> Iterator[Sequence[Sender]]:
    """Begins or continues a run at the trackers that ``config.log`` names, and ends it there.

    Only the first process has any.

    Raises:
      ConfigError: a tracker that cannot be used, for example without a login.
    """
    known = _read_marks(workdir / MARKS)
    wanted = {
        f"wandb {config.log.wandb_project}": (config.log.wandb_project, _WandB),
        f"mlflow {config.log.mlflow_experiment}": (config.log.mlflow_experiment, _MLflow),
    }
    with ExitStack() as open_senders:
        senders = []
        for name, (project, kind) in wanted.items():
            if not project or not is_first():
                continue
            marks = known.get(name, {})
            try:
                tracker = kind(workdir, config, marks.get("id", ""))
            except Exception as error:  # each client has its own errors
                raise ConfigError(f"{name} cannot be used: {one_line(error)}") from error
            senders.append(Sender(workdir, name, tracker, marks))
            open_senders.push(
                lambda kind, *_, sender=senders[-1]: sender.close(failed=kind is not None)
            )
        yield senders


def _read_marks(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _tags(config: Config) -> list[str]:
    return [tag.strip() for tag in config.log.tags.split(",") if tag.strip()]


class _WandB:
    """A run at Weights & Biases; ``WANDB_MODE=offline`` keeps it in the workdir."""

    def __init__(self, workdir: Path, config: Config, run_id: str) -> None:
        import wandb

        self._wandb, self.id = wandb, run_id or uuid.uuid4().hex
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.log.run_name or workdir.resolve().name,
            group=config.log.group or None,
            tags=_tags(config),
            dir=str(workdir),
            id=self.id,
            resume="allow",
        )
        self._run.config.update(to_dict(config), allow_val_change=True)
        # W&B's step only grows; the scores of an evaluation may come after the next step's line.
        self._run.define_metric("*", step_metric="step")
        self.last_step = int(self._run.summary.get("step") or -1) if self._run.resumed else -1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics))

    def samples(self, step: int, file: Path) -> None:
        rows = [[row.get(name) for name in COLUMNS] for row in read_jsonl(file)]
        table = self._wandb.Table(columns=list(COLUMNS), data=rows)
        self._run.log({"step": step, "samples": table})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of an MLflow experiment at ``MLFLOW_TRACKING_URI``, else in the workdir's mlruns/."""

    def __init__(self, workdir: Path, config: Config, run_id: str) -> None:
        # MLflow asks for this consent before it uses a folder.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (workdir / "mlruns").resolve().as_uri()
        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        self.id = run_id or self._create(config, workdir.resolve().name)
        if run_id:
            self._client.update_run(self.id, status="RUNNING")
        else:
            values = [
                Param(key, json.dumps(value)[:PARAMETER_CHARACTERS])
                for key, value in flatten(to_dict(config)).items()
            ]
            for start in range(0, len(values), PARAMETERS):
                self._client.log_batch(self.id, params=values[start : start + PARAMETERS])
        self._client.log_dict(self.id, to_dict(config), "config.json")
        self.last_step = int(self._client.get_run(self.id).data.metrics.get("step", -1))

    def _create(self, config: Config, name: str) -> str:
        title = config.log.mlflow_experiment
        experiment = self._client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else self._client.create_experiment(title)
        tags = {"group": config.log.group, **dict.fromkeys(_tags(config), "true")}
        tags = {key: value for key, value in tags.items() if value}
        run = self._client.create_run(number, tags=tags, run_name=config.log.run_name or name)
        return run.info.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        values = [
            self._metric(NOT_IN_NAMES.sub("_", name), value, now, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self.id, metrics=values)

    def samples(self, step: int, file: Path) -> None:
        self._client.log_artifact(self.id, str(file), "samples")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
