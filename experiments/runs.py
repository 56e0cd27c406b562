"""A run's folder: configuration, metrics, curves, checkpoints, summary.

config.json     the resolved configuration, written first
metrics.csv     one line an epoch, appended as it goes
tensorboard/    the same as event files
checkpoints/    the last ones, and that of the best epoch (orbax)
curves.png      loss and validation accuracy, drawn at the end
summary.json    status, how far it got, test accuracy; written last, also after an interruption
"""

import csv
import datetime
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any, TextIO

import matplotlib.figure
import tensorboardX

from experiments import files

COLUMNS: tuple[str, ...] = (
    "epoch",
    "step",
    "loss",
    "validation_accuracy",
    "validation_loss",
    "examples_per_second",
)


class RunFolder:
    """The files of one run, but for its checkpoints; see :meth:`create` for a new one.

    Args:
        path: of the folder.
        writes: whether anything is written; of several processes one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path.resolve()
        self._writes = writes
        self.checkpoints = self.path / "checkpoints"
        self.metrics: list[dict[str, Any]] = []
        self._events: tensorboardX.SummaryWriter | None = None
        self._lock: TextIO | None = None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> "RunFolder":
        """A new folder, or an existing empty one, with its configuration.

        Raises:
            OSError: if `path` exists and is not an empty folder, or cannot be made.
        """
        check_new(path)
        path.mkdir(parents=True, exist_ok=path.is_dir())
        folder = cls(path)
        folder.write_json("config.json", config)
        return folder

    def lock(self) -> None:
        """Keeps other processes from writing here; the lock ends with this process at the latest.

        Raises:
            BlockingIOError: if another process has it.
        """
        if not self._writes:
            return
        self._lock = (self.path / "config.json").open()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise BlockingIOError(f"{self.path} is in use by another process") from error

    def read_summary(self) -> dict[str, Any]:
        """summary.json, or an empty one."""
        try:
            return json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes `name` as indented JSON, all of it or nothing."""
        self._write(name, json.dumps(content, indent=2) + "\n")

    def start_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Makes metrics.csv and the event files anew, with the epochs that a checkpoint knows.

        An interrupted run may have written epochs after its last checkpoint.
        """
        self.metrics = []
        if not self._writes:
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
        """Adds one epoch, with the columns of `COLUMNS`."""
        self.metrics.append(row)
        if self._events is None:
            return
        with (self.path / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        for name in COLUMNS[2:]:
            self._events.add_scalar(name, row[name], row["step"])
        self._events.flush()

    def draw_curves(self) -> None:
        """Draws curves.png from the metrics so far."""
        if not self._writes:
            return
        epochs = [row["epoch"] for row in self.metrics]
        figure = matplotlib.figure.Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(epochs, [row["loss"] for row in self.metrics], color="black")
        left.set(xlabel="epoch", ylabel="training loss")
        accuracies = [100 * row["validation_accuracy"] for row in self.metrics]
        right.plot(epochs, accuracies, color="black")
        right.set(xlabel="epoch", ylabel="validation accuracy (%)")
        figure.savefig(self.path / "curves.png", dpi=120)

    def close(self) -> None:
        """Closes the event files, and lets others write."""
        for file in (self._events, self._lock):
            if file is not None:
                file.close()

    def _write(self, name: str, text: str) -> None:
        if self._writes:
            files.write(self.path / name, text)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of the run in the folder `path`.

    Raises:
        FileNotFoundError: if it is no run folder.
        ValueError: if the configuration is no JSON object.
    """
    try:
        config = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise FileNotFoundError(f"{path} is no run folder: it has no config.json") from error
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} is damaged: it holds no configuration")
    return config


def check_new(path: Path) -> None:
    """Raises a FileExistsError if a run cannot be written to `path` without loss."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is never overwritten")


def new_folder(name: str, parent: Path = Path("runs")) -> Path:
    """A path in `parent` that does not exist yet: name, date and time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, copy = parent / f"{name}-{stamp}", 1
    while path.exists():
        copy += 1
        path = parent / f"{name}-{stamp}-{copy}"
    return path
