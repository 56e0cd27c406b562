"""The folder of a run: configuration, metrics, curves, checkpoints, summary.

config.json     all options with their values, written first
metrics.csv     one line per epoch, appended during training
seal.json       digests of the files that are read again
tensorboard/    the same numbers as event files
checkpoints/    the latest checkpoints and that of the best epoch (orbax)
tokenizer.json  what made the tokens, if the examples are texts
curves.png      losses, validation accuracy and learning rate, drawn at the end
summary.json    status, progress, test accuracy; written last, also after an interruption
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorboardX

from experiments.config.config import TOKENIZER, Config
from experiments.system import files, schema, seals
from experiments.system.command_line import ArgumentError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.csv", "summary.json"
SEALED = (CONFIG, TOKENIZER, METRICS, SUMMARY)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The content of summary.json: how a run stands, or ended.

    Attributes:
        status: "started", "interrupted", "finished", or "stopped: " and why.
        checkpoint_epoch: number of the best epoch; None before the first one.
        test_accuracy: of the best epoch; None if it was not tested, or was not finite.
        changed: what was changed when the run was resumed, in words.

    The other attributes are what their names say.
    """

    status: str
    epochs_completed: int
    epochs: int
    steps: int
    steps_per_epoch: int
    checkpoint_epoch: int | None
    validation_accuracy: float | None
    test_accuracy: float | None
    last_test_accuracy: float | None
    test_examples: int
    seconds: float
    compile_seconds: float
    peak_memory_bytes: int
    device: str
    devices: int
    processes: int
    versions: dict[str, str]
    changed: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs were trained."""
        return self.status == "finished"


@dataclasses.dataclass(frozen=True)
class Metrics:
    """A line of metrics.csv. A method without a radius has no rho."""

    epoch: int
    step: int
    loss: float
    validation_accuracy: float
    validation_loss: float
    examples_per_second: float
    learning_rate: float
    rho: float | None = None


COLUMNS = tuple(field.name for field in dataclasses.fields(Metrics))


class RunFolder:
    """The files of one run, except its checkpoints. :meth:`create` makes a new one.

    Args:
        path: path of the folder.
        writes: whether this process writes. Of several processes, only the first one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path.resolve()
        self.writes = writes
        self.checkpoints = self.path / "checkpoints"
        self.metrics: list[dict[str, Any]] = []
        self._events: tensorboardX.SummaryWriter | None = None
        self._lock = contextlib.ExitStack()

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> "RunFolder":
        """Makes a new folder, or takes an empty one, locks it and writes the configuration.

        Raises:
            OSError: if `path` exists and is not an empty folder, cannot be made, or is in use.
        """
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder.lock()
        files.check_new(path)  # under the lock
        folder.write_sealed({CONFIG: as_text(config)})
        return folder

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is a complete checkpoint."""
        there = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return any(path.name.isdecimal() for path in there)

    def lock(self) -> None:
        """Keeps other processes from writing here until :meth:`close` or the end of this process.

        Raises:
            BlockingIOError: if another process has the lock.
            OSError: if there is a link in the folder.
        """
        if self.writes:
            self._lock.enter_context(files.locked(self.path))

    def read_summary(self) -> Summary | None:
        """Returns summary.json; None if there is none.

        Raises:
            ArgumentError: if it is damaged.
        """
        if not (self.path / SUMMARY).exists():
            return None
        content = seals.read_sealed(self.path, SUMMARY)
        return schema.json_as(Summary, content, self.path / SUMMARY)

    def write_summary(self, summary: Summary) -> None:
        """Writes summary.json, and seals metrics.csv unless the run has just started."""
        texts = {SUMMARY: as_text(dataclasses.asdict(summary))}
        if summary.status != "started":
            texts = {METRICS: files.csv_of(COLUMNS, self.metrics)} | texts
        self.write_sealed(texts)

    def write_sealed(self, texts: dict[str, str], unsealed: Sequence[str] = ()) -> None:
        """See :func:`experiments.system.seals.write_sealed`."""
        if self.writes:
            seals.write_sealed(self.path, texts, unsealed)

    def start_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Rewrites metrics.csv and the event files with the epochs of a checkpoint.

        An interrupted run may have written later epochs.
        """
        self.metrics = []
        if not self.writes:
            self.metrics += rows
            return
        self.write_sealed({}, unsealed=[METRICS])  # it grows
        files.write_csv(self.path / METRICS, COLUMNS, [])
        if self._events is not None:
            self._events.close()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self._events = tensorboardX.SummaryWriter(str(self.path / "tensorboard"))
        for row in rows:
            self.append_metrics(row)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Appends one epoch, with the columns of `COLUMNS`."""
        self.metrics.append(row)
        if self._events is None:
            return
        files.append_text(self.path / METRICS, files.csv_of(COLUMNS, [row], header=False))
        for name in COLUMNS[2:]:
            if name in row:
                self._events.add_scalar(name, row[name], row["step"])
        self._events.flush()

    def append_hyperparameters(
        self, values: dict[str, Any], results: dict[str, float | None]
    ) -> None:
        """Appends hyperparameters and results for TensorBoard's page of many runs."""
        if self._events is not None:
            known = {name: result for name, result in results.items() if result is not None}
            # "." is this folder. Otherwise they would become a run of their own.
            self._events.add_hparams(values, known, name=".")

    def close(self) -> None:
        """Closes the event files and releases the lock."""
        if self._events is not None:
            self._events.close()
        self._lock.close()


def as_text(content: dict[str, Any]) -> str:
    """Returns the text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


def as_json(config: Config) -> dict[str, Any]:
    """Returns the options as JSON values."""
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def read_config(path: Path) -> Config:
    """Returns the options of the run in the folder `path`.

    Raises:
        ArgumentError: if it is no run folder, or its configuration is damaged.
    """
    if not (path / CONFIG).is_file():
        raise ArgumentError(f"{path} is no run folder: it has no {CONFIG}")
    content = seals.read_sealed(path, CONFIG)
    return dataclasses.replace(schema.json_as(Config, content, path / CONFIG), output=path)


def read_metrics(path: Path) -> list[Metrics]:
    """Returns the epochs of the finished run in the folder `path`.

    Raises:
        ArgumentError: if metrics.csv is damaged or cannot be read.
    """
    return schema.csv_as(Metrics, seals.read_sealed(path, METRICS), path / METRICS)
