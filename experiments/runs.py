"""A run's folder: configuration, metrics, curves, checkpoint, summary.

config.json     the resolved configuration, written first
metrics.csv     one line an epoch, appended as it goes
checkpoint/     parameters and batch statistics of the best epoch (orbax)
curves.png      loss and validation accuracy
summary.json    status, how far it got, test accuracy; written last, also after an interruption
"""

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import orbax.checkpoint as ocp

COLUMNS: tuple[str, ...] = ("epoch", "step", "loss", "validation_accuracy", "examples_per_second")


class RunFolder:
    """A new folder, or an existing empty one.

    Raises:
        FileExistsError: if `path` exists and is not an empty folder.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(f"{path} exists already and is never overwritten")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()
        self.metrics: list[dict[str, Any]] = []
        self._checkpoints = ocp.CheckpointManager(
            self.path / "checkpoint", options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes `name` as indented JSON."""
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one epoch to metrics.csv, with the columns of `COLUMNS`."""
        with (self.path / "metrics.csv").open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not self.metrics:
                writer.writeheader()
            writer.writerow(row)
        self.metrics.append(row)

    def save_checkpoint(self, epoch: int, tree: Any) -> None:
        """Starts to write the best parameters so far; the earlier ones go when these are there."""
        self._checkpoints.save(epoch, args=ocp.args.StandardSave(tree))

    def restore_checkpoint(self, like: Any) -> Any:
        """The saved tree, in the types of `like`."""
        self._checkpoints.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._checkpoints.restore(
            self._checkpoints.latest_step(), args=ocp.args.StandardRestore(abstract)
        )

    def best_epoch(self) -> int | None:
        """The epoch of the checkpoint, or None before the first."""
        self._checkpoints.wait_until_finished()
        return self._checkpoints.latest_step()

    def draw_curves(self) -> None:
        """Draws curves.png from the metrics so far."""
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
        """Waits for what is being written."""
        self._checkpoints.close()


def new_folder(name: str, parent: Path = Path("runs")) -> Path:
    """A path in `parent` that does not exist yet: name, date and time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, copy = parent / f"{name}-{stamp}", 1
    while path.exists():
        copy += 1
        path = parent / f"{name}-{stamp}-{copy}"
    return path
