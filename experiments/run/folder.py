"""The folder of a run: configuration, metrics, curves, checkpoints, summary.

config.json     all options with their values, written first
metrics.csv     one line per epoch, appended during training
tensorboard/    the same numbers as event files
checkpoints/    the latest checkpoints and that of the best epoch (orbax)
tokenizer.json  what made the tokens, if the examples are texts
curves.png      losses, validation accuracy and learning rate, drawn at the end
summary.json    status, progress, test accuracy; written last, also after an interruption
"""

import contextlib
import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import tensorboardX

from experiments.config.config import Config
from experiments.system import files
from experiments.system.command_line import ArgumentError

COLUMNS: tuple[str, ...] = (
    "epoch",
    "step",
    "loss",
    "validation_accuracy",
    "validation_loss",
    "examples_per_second",
    "learning_rate",
    "rho",
)


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
        """Makes a new folder, or takes an empty one, and writes the configuration.

        Raises:
            OSError: if `path` exists and is not an empty folder, or cannot be made.
        """
        files.check_new(path)
        path.mkdir(parents=True, exist_ok=path.is_dir())
        folder = cls(path)
        folder.write_json("config.json", config)
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
        """
        if self.writes:
            self._lock.enter_context(files.locked(self.path))

    def read_summary(self) -> dict[str, Any]:
        """Returns summary.json, or {} if there is none."""
        try:
            return json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes `name` as indented JSON, whole or not at all."""
        self._write(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes `name`, whole or not at all."""
        self._write(name, text)

    def start_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Rewrites metrics.csv and the event files with the epochs of a checkpoint.

        An interrupted run may have written later epochs.
        """
        self.metrics = []
        if not self.writes:
            self.metrics += rows
            return
        self._write("metrics.csv", ",".join(COLUMNS) + "\n")
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
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
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

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            files.write_text(self.path / name, text)


def as_json(config: Config) -> dict[str, Any]:
    """Returns the options as JSON values."""
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def read_config(path: Path) -> Config:
    """Returns the options of the run in the folder `path`.

    Raises:
        ArgumentError: if it is no run folder, or is of another version.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ArgumentError(f"{path} is no run folder: it has no config.json")
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no configuration")
        if odd := {field.name for field in dataclasses.fields(Config)} ^ set(values):
            raise ValueError(f"it is of another version: {', '.join(sorted(odd))}")
        paths = {"output": path, "data_dir": values["data_dir"] and Path(values["data_dir"])}
        return Config(**values | paths)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{file} is damaged or cannot be read: {error}") from error
