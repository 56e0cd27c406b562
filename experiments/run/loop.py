"""The loop of one training run: steps, epochs, checkpoints, end or interruption."""

import dataclasses
import signal
import time
from typing import Any

import jax
import numpy as np

from experiments.run.checkpoints import UNKNOWN, CheckpointError, Checkpoints
from experiments.run.experiment import Experiment
from experiments.run.folder import RunFolder
from experiments.step.feeds import advance
from experiments.system import machine, processes, progress
from experiments.system.interruption import Interruption


class NonFiniteLossError(Exception):
    """The loss became infinite or NaN."""


class Run:
    """A run in progress: its state, and what it writes.

    Args:
        experiment: what the run computes with.
        folder: where the run writes. If there are checkpoints, it resumes from the last one.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: number of latest checkpoints to keep.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or belongs to another run.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        checkpoint_every: int,
        keep_checkpoints: int,
    ) -> None:
        self.experiment, self.folder = experiment, folder
        self.checkpoint_every = checkpoint_every
        self.state = experiment.first_state()
        self.checkpoints = Checkpoints(folder.checkpoints, keep_checkpoints)
        self.started = time.perf_counter()
        self.seconds_before = self.seconds_in_epoch = 0.0
        self.step = 0
        self.losses: list[float] = []  # of the current epoch
        self.compile_seconds = 0.0
        rows = self._restore(saved[-1]) if (saved := self.checkpoints.steps()) else []
        folder.start_metrics(rows)
        # The metrics of the best epoch.
        best_step = self.checkpoints.best_step()
        self.best = next((row for row in rows if row["step"] == best_step), None)
        self.write_summary("started")

    def _restore(self, step: int) -> list[dict[str, Any]]:
        """Restores the checkpoint of `step`; returns its metrics."""
        self.state, progress = self.checkpoints.restore(step, self.state)
        there, here = progress["identity"], self._identity()
        for name, value in here.items():
            if there.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint {self.folder.checkpoints / str(step)} is of another run: its "
                    f"{name} is {there.get(name)}, not {value}"
                )
        self.step, self.losses = step, progress["losses"]
        self.seconds_in_epoch = progress["seconds_in_epoch"]
        self.seconds_before = progress["seconds"]
        print(f"resuming from step {step}")
        return progress["metrics"]

    def _identity(self) -> dict[str, Any]:
        """Returns what must be the same when a run is resumed."""
        experiment = self.experiment
        values = dataclasses.asdict(experiment.recipe)
        values |= values.pop("hyperparameters")
        if values["batch_statistics"] == "per-device":
            values["parts_of_a_batch"] = experiment.layout.parts
        # A list, since JSON has no tuples.
        return values | {
            "train_examples": experiment.train.examples,
            "image_shape": list(experiment.dataset.image_shape),
        }

    def train(self, interruption: Interruption) -> None:
        """Runs the remaining steps, or stops at an interruption."""
        if self.step == self.experiment.total_steps:
            return
        compiling = time.perf_counter()
        recipe = self.experiment.recipe
        launch = self.experiment.train.launch(
            self.experiment.step, self.state, recipe.batch_size, recipe.seed, recipe.epochs
        )
        self.compile_seconds = time.perf_counter() - compiling
        print(
            f"compiled in {self.compile_seconds:.1f} s, writing to {self.folder.path}", flush=True
        )
        steps, every = self.experiment.steps_per_epoch, self.checkpoint_every
        total, silent = self.experiment.total_steps, not processes.is_first()
        with progress.shown(total, "step", done=self.step, silent=silent) as bar:
            while self.step < self.experiment.total_steps and not interruption.signal:
                epoch_end = (self.step // steps + 1) * steps
                checkpoint = (self.step // every + 1) * every
                begun = time.perf_counter()
                self.state, self.step = advance(
                    launch,
                    self.state,
                    self.step,
                    min(epoch_end, checkpoint),
                    lambda losses: self._note(losses, bar),
                    interruption.noted,
                )
                self.seconds_in_epoch += time.perf_counter() - begun
                if self.step == epoch_end:
                    self._end_epoch()
                elif self.step == checkpoint:
                    self._save()
            if interruption.signal:
                self._save()

    def _note(self, losses: list[float], bar: progress.Bar) -> None:
        self.losses += losses
        bar.advance(len(losses))
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(self.losses))[0])
            self._stop_at(len(self.folder.metrics) * self.experiment.steps_per_epoch + first)

    def _stop_at(self, step: int) -> None:
        raise NonFiniteLossError(
            f"stopped: the loss is not finite at step {step} (epoch "
            f"{len(self.folder.metrics) + 1}); a smaller --learning-rate or --rho may help"
        )

    def _end_epoch(self) -> None:
        experiment = self.experiment
        accuracy, loss = experiment.evaluate(
            self.state.params, self.state.stats, experiment.validation
        )
        # The losses do not cover the parameters after the last step.
        if not np.isfinite(accuracy):
            self._stop_at(self.step)
        examples = experiment.steps_per_epoch * experiment.recipe.batch_size
        row = {
            "epoch": len(self.folder.metrics) + 1,
            "step": self.step,
            "loss": float(np.mean(self.losses)),
            "validation_accuracy": accuracy,
            "validation_loss": loss,
            "examples_per_second": examples / self.seconds_in_epoch,
        }
        self.losses, self.seconds_in_epoch = [], 0.0
        self.folder.append_metrics(row)
        # The later of two equal epochs is better: it is trained longer.
        is_best = self.best is None or accuracy >= self.best["validation_accuracy"]
        last = self.step == experiment.total_steps
        if is_best or last or self.step % self.checkpoint_every == 0:
            self._save(accuracy)
        if is_best:
            self.best = row
        progress.print_line(
            f"epoch {row['epoch']:3d}  loss {row['loss']:.4f}  validation {100 * accuracy:6.2f} %  "
            f"{row['examples_per_second']:,.0f} examples/s"
        )

    def _save(self, accuracy: float = UNKNOWN) -> None:
        # Copied lists: orbax writes them while training continues.
        progress = {
            "identity": self._identity(),
            "metrics": list(self.folder.metrics),
            "losses": list(self.losses),
            "seconds_in_epoch": self.seconds_in_epoch,
            "seconds": self._seconds(),
        }
        self.checkpoints.save(self.step, self.state, progress, accuracy)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self, interruption: Interruption) -> dict[str, Any]:
        """Tests the best checkpoint, writes curves and summary, and returns the summary."""
        self.checkpoints.wait()
        if interruption.signal and self.step < self.experiment.total_steps:
            self.folder.draw_curves()
            # After a SIGTERM there may be little time.
            terminated = interruption.signal == signal.SIGTERM
            summary = self.write_summary("interrupted", None if terminated else self._test())
            if not terminated:
                raise KeyboardInterrupt
            return summary
        self.folder.draw_curves()
        return self.write_summary("finished", self._test())

    def _test(self) -> float | None:
        if self.best is None:
            return None
        state, _ = self.checkpoints.restore(self.best["step"], self.state)
        return self.experiment.evaluate(state.params, state.stats, self.experiment.test).accuracy

    def write_summary(self, status: str, test_accuracy: float | None = None) -> dict[str, Any]:
        """Writes summary.json with what is known now, and returns it."""
        summary = {
            "status": status,
            "epochs_completed": len(self.folder.metrics),
            "epochs": self.experiment.recipe.epochs,
            "steps": self.step,
            "steps_per_epoch": self.experiment.steps_per_epoch,
            "checkpoint_epoch": self.best and self.best["epoch"],
            "validation_accuracy": self.best and self.best["validation_accuracy"],
            "test_accuracy": test_accuracy,
            "test_examples": self.experiment.test.examples,
            "seconds": round(self._seconds(), 2),
            "compile_seconds": round(self.compile_seconds, 2),
            "peak_memory_bytes": machine.peak_bytes(),
            "device": jax.devices()[0].device_kind,
            "devices": self.experiment.layout.mesh.size,
            "processes": jax.process_count(),
            "versions": machine.versions(),
        }
        self.folder.write_json("summary.json", summary)
        return summary

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self.checkpoints.close()
