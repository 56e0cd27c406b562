"""The loop of one training run: steps, epochs, checkpoints, end or interruption."""

import dataclasses
import operator
import signal
import time
from typing import Any

import jax
import numpy as np

from experiments.config.config import CHANGEABLE, option_of
from experiments.data import base_name
from experiments.run import curves
from experiments.run.arrays import all_finite
from experiments.run.checkpoints import (
    UNKNOWN,
    CheckpointError,
    Checkpoints,
    DamagedCheckpointError,
)
from experiments.run.ends import InterruptedRunError, NonFiniteLossError
from experiments.run.experiment import Experiment
from experiments.run.folder import RunFolder, Summary
from experiments.step.feeds import advance
from experiments.step.train_step import TrainState
from experiments.system import files, machine, processes, progress
from experiments.system.exhaustion import what_is_exhausted
from experiments.system.interruption import Interruption


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
        self.changed: list[str] = []
        rows = self._restore_last()
        folder.start_metrics(rows)
        # The metrics of the best epoch.
        best_step = self.checkpoints.best_step()
        # The later of two equal epochs is better: it is trained longer.
        rank = operator.itemgetter("validation_accuracy", "step")
        self.best = max(rows, key=rank, default=None)
        if self.best and self.best["step"] != best_step:
            raise CheckpointError(
                f"the checkpoint of the best epoch, {folder.checkpoints / str(self.best['step'])}, "
                "is missing: remove the later ones to train again from the one before it"
            )
        self.write_summary("started")

    def _restore_last(self) -> list[dict[str, Any]]:
        """Restores the last checkpoint that is not damaged, if any; returns its metrics."""
        for step in reversed(saved := self.checkpoints.steps()):
            try:
                return self._restore(step)
            except DamagedCheckpointError as error:
                # With several processes, one alone cannot decide.
                if step == saved[0] or jax.process_count() > 1:
                    raise
                place = files.as_typed(self.checkpoints.set_aside(step))
                print(f"{error}. It is now {place}, and the checkpoint before is taken")
        return []

    def _restore(self, step: int) -> list[dict[str, Any]]:
        """Restores the checkpoint of `step`; returns its metrics."""
        self.state, progress = self.checkpoints.restore(step, self.state)
        there, here = progress["identity"], self.experiment.identity
        for name, value in here.items():
            if there.get(name) == value:
                continue
            if name not in CHANGEABLE:
                raise CheckpointError(
                    f"the checkpoint {self.folder.checkpoints / str(step)} is of another run: its "
                    f"{name} is {there.get(name)}, not {value}"
                )
            self.changed.append(f"{option_of(name)} {value:g} from step {step}")
        self.changed = progress["changed"] + self.changed
        self.step, self.losses = step, progress["losses"]
        self.seconds_in_epoch = progress["seconds_in_epoch"]
        self.seconds_before = progress["seconds"]
        print(f"resuming from step {step}")
        return progress["metrics"]

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
        print(f"compiled in {self.compile_seconds:.1f} s", flush=True)
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
            before = len(self.folder.metrics) * self.experiment.steps_per_epoch
            self._stop("the loss", before + first)

    def _stop(self, what: str, step: int) -> None:
        """Raises NonFiniteLossError for what is not finite after `step` steps."""
        self.checkpoints.wait()
        how = f"start again with a smaller {' or '.join(map(option_of, self._smaller()))}"
        if saved := self.checkpoints.steps():
            option = option_of(self._smaller()[0])
            how = (
                f"to go on from step {saved[-1]}: python -m experiments.train --resume "
                f"{files.as_typed(self.folder.path)} {option} VALUE, with a smaller value"
            )
        epoch = len(self.folder.metrics) + 1
        why = f"stopped: {what} is not finite after step {step} (epoch {epoch})"
        raise NonFiniteLossError(why, how)

    def _smaller(self) -> list[str]:
        return [name for name in CHANGEABLE if name in self.experiment.recipe.hyperparameters]

    def _end_epoch(self) -> None:
        experiment = self.experiment
        accuracy, loss = experiment.evaluate(
            self.state.params, self.state.stats, experiment.validation
        )
        # The losses do not cover the parameters after the last step.
        if not np.isfinite(accuracy):
            self._stop("a logit", self.step)
        examples = experiment.steps_per_epoch * experiment.recipe.batch_size
        row = {
            "epoch": len(self.folder.metrics) + 1,
            "step": self.step,
            "loss": float(np.mean(self.losses)),
            "validation_accuracy": accuracy,
            "validation_loss": loss,
            "examples_per_second": examples / self.seconds_in_epoch,
            **experiment.rates(self.step - 1),
        }
        self.losses, self.seconds_in_epoch = [], 0.0
        self.folder.append_metrics(row)
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
        # A loss notices them one step later.
        if not all_finite(self.state):
            self._stop("a parameter", self.step)
        # Copies: orbax writes them while training continues.
        progress = {
            "identity": self.experiment.identity,
            "metrics": list(self.folder.metrics),
            "losses": list(self.losses),
            "changed": list(self.changed),
            "seconds_in_epoch": self.seconds_in_epoch,
            "seconds": self._seconds(),
        }
        self.checkpoints.save(self.step, self.state, progress, accuracy)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self, interruption: Interruption) -> dict[str, Any]:
        """Tests the last and the best epoch, writes curves and summary, and returns the summary.

        Raises:
            InterruptedRunError: after Ctrl-C. The best checkpoint so far is tested.
        """
        self.checkpoints.wait()
        recipe = self.experiment.recipe
        epoch = None if self.best is None else self.best["epoch"]
        title = f"{recipe.label} on {base_name(recipe.dataset)}, {recipe.model}, seed {recipe.seed}"
        curves.draw(self.folder, title, epoch)
        if interruption.signal == signal.SIGTERM and self.step < self.experiment.total_steps:
            return self.write_summary("interrupted")  # there may be little time
        last = self._tested(self.state)
        best = self._tested(self._best_state())
        if interruption.signal and self.step < self.experiment.total_steps:
            raise InterruptedRunError(self.write_summary("interrupted", best, last))
        summary = self.write_summary("finished", best, last)
        self.folder.append_hyperparameters(
            {"method": recipe.label, "seed": recipe.seed, **recipe.hyperparameters},
            {"test_accuracy": best, "last_test_accuracy": last},
        )
        return summary

    def _best_state(self) -> TrainState | None:
        if self.best is None:
            return None
        return self.checkpoints.restore(self.best["step"], self.state)[0]

    def _tested(self, state: TrainState | None) -> float | None:
        if state is None:
            return None
        test = self.experiment.test
        accuracy = self.experiment.evaluate(state.params, state.stats, test).accuracy
        return accuracy if np.isfinite(accuracy) else None

    def write_summary(
        self, status: str, test_accuracy: float | None = None, last: float | None = None
    ) -> dict[str, Any]:
        """Writes summary.json with what is known now, and returns it with the folder's path."""
        best = self.best or {}
        summary = Summary(
            status=status,
            epochs_completed=len(self.folder.metrics),
            epochs=self.experiment.recipe.epochs,
            steps=self.step,
            steps_per_epoch=self.experiment.steps_per_epoch,
            checkpoint_epoch=best.get("epoch"),
            validation_accuracy=best.get("validation_accuracy"),
            test_accuracy=test_accuracy,
            last_test_accuracy=last,
            test_examples=self.experiment.test.examples,
            seconds=round(self._seconds(), 2),
            compile_seconds=round(self.compile_seconds, 2),
            peak_memory_bytes=machine.peak_bytes(),
            device=jax.devices()[0].device_kind,
            devices=self.experiment.layout.mesh.size,
            processes=jax.process_count(),
            versions=machine.versions(),
            changed=self.changed,
        )
        self.folder.write_summary(summary)
        return dataclasses.asdict(summary) | {"folder": str(self.folder.path)}

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        try:
            self.checkpoints.close()
        except Exception as error:
            # A save that failed has been told, by the next one or at the end.
            if what_is_exhausted(error) is None:
                raise
