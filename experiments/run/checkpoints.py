"""Checkpoints of a run: everything needed to resume it bit for bit."""

import gc
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.run.arrays import by_name, described, hashes_of, name_of, shape_in_words
from experiments.system import seals

# Orbax warns about intended uses, such as only reading, and prints errors that it also raises.
absl.logging.set_verbosity(absl.logging.FATAL)

# Below every accuracy: such a checkpoint is the best only if there is no other.
UNKNOWN = -1.0
_UNREADABLE = -2.0


class CheckpointError(Exception):
    """A checkpoint that cannot be read or belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not as it was written."""


class Checkpoints:
    """The latest checkpoints of a run and the best one.

    They are written in the background. A checkpoint appears under its step when it is complete.
    It has two items: `state`, the arrays, and `about`, everything else: the progress, the accuracy,
    shape, dtype and a hash of each array, and the digest of all this.

    Args:
        folder: folder of the checkpoints, made if it does not exist. Remains of an interrupted
            write are removed.
        keep: number of latest checkpoints to keep, in addition to the best; None to only read and
            change nothing in the folder.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder
        self._accuracies: dict[int, float] = {}
        self._keep = keep
        read_only = keep is None
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Preserved(self),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )
        for step in self.steps():
            try:
                self._accuracies[step] = float(self._about(step)["accuracy"])
            except DamagedCheckpointError:
                self._accuracies[step] = _UNREADABLE

    def save(
        self, step: int, state: Any, progress: dict[str, Any], accuracy: float = UNKNOWN
    ) -> None:
        """Starts to write a checkpoint, unless `step` already has one.

        Args:
            step: number of steps so far.
            state: a tree of arrays, copied before this returns.
            progress: what the run knows in addition to its state, as JSON values.
            accuracy: validation accuracy at the end of an epoch; `UNKNOWN` within an epoch.
        """
        if step in self.steps():
            return
        self._accuracies[step] = accuracy
        content = {"step": step, "accuracy": accuracy, "progress": progress}
        content["arrays"] = described(state, hashes_of(state))
        about = {"content": content, "sha256": seals.digest(content)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the last step of the highest accuracy, or None without checkpoints.

        Raises:
            DamagedCheckpointError: if the accuracy of a checkpoint cannot be read.
        """
        self.wait()
        steps = self.steps()
        for step in steps:
            if self._accuracies[step] == _UNREADABLE:
                self._about(step)  # raises
        return self.best_of(steps)

    def best_of(self, steps: Sequence[int]) -> int | None:
        """Returns the last of the given steps with the highest accuracy; None if there are none."""
        # The later of two equals is trained longer.
        return max(
            steps, key=lambda step: (self._accuracies.get(step, UNKNOWN), step), default=None
        )

    def kept_of(self, steps: Sequence[int]) -> set[int | None]:
        """Returns which of the given steps, in order, are the latest ones or the best one."""
        return {*steps[-(self._keep or len(steps)) :], self.best_of(steps)}

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint out of the way, and returns where it is."""
        self.wait()
        place = self.folder.with_name("damaged") / str(step)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(place)
        self._manager.reload()
        return place

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state and the progress at `step`.

        Args:
            step: one of :meth:`steps`.
            like: a state of the same structure, shapes and dtypes.

        Raises:
            DamagedCheckpointError: if the checkpoint is not as it was written.
            CheckpointError: if its state is not like `like`.
        """
        self.wait()
        about = self._about(step)
        asked = described(like, {})
        for name in [*asked, *about["arrays"]]:
            found, wanted = (known.get(name) for known in (about["arrays"], asked))
            if found is None or wanted is None or found[1:] != wanted[1:]:
                raise CheckpointError(
                    f"the checkpoint {self.folder / str(step)} is of another network: its "
                    f"{name_of(name)} is {shape_in_words(found)}, not {shape_in_words(wanted)}"
                )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            state = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
            # The arrays' files have no checksum.
            if described(state, hashes_of(state)) == about["arrays"]:
                return state, about["progress"]
            reason = "the arrays are not those that were saved"
        # A damaged file can make the readers raise anything.
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # Another process may be gone.
            reason = _first_line(error)
        raise self._damaged(step, reason)

    def _about(self, step: int) -> dict[str, Any]:
        """Returns what is known about a checkpoint, once its digest is checked."""
        try:
            about = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
            content = about["content"]
            if about["sha256"] == seals.digest(content) and content["step"] == step:
                return content
            reason = "what is known about it is not what was saved"
        except Exception as error:  # see restore
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise
            reason = _first_line(error)
        raise self._damaged(step, reason)

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        _forget_failed_reads()
        return DamagedCheckpointError(
            f"the checkpoint {self.folder / str(step)} is damaged ({reason}). To resume before "
            "it, remove it and the later ones; to evaluate another one, name its --step"
        )

    def parameters(self, step: int) -> dict[str, np.ndarray]:
        """Returns the parameters at `step`, of whatever network, by their names in the tree.

        They may have been saved on other devices.

        Raises:
            DamagedCheckpointError: if the checkpoint is not as it was written.
        """
        self.wait()
        about = self._about(step)
        try:
            params = _read_parameters(self.folder.resolve() / str(step) / "state")
            known = {name_of(path): how[0] for path, how in about["arrays"].items()}
            found = {name_of(p): sum_ for p, sum_ in hashes_of({"params": params}).items()}
            if found.items() <= known.items():
                return by_name(params)
            reason = "the arrays are not those that were saved"
        except Exception as error:  # see restore
            reason = _first_line(error)
        raise self._damaged(step, reason)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and ends the background work."""
        self._manager.close()


def _read_parameters(path: Path) -> Any:
    """Returns the parameters of a saved state as NumPy arrays, in dictionaries."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        known: Any = reader.metadata(path)
        for name in ("item_metadata", "tree"):  # as versions of orbax have it
            known = getattr(known, name, known)
        wanted = {"params": known["params"]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        return reader.restore(
            path,
            args=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True),
        )["params"]


class _Preserved:
    """The policy of orbax's manager: which checkpoints to keep after a save."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [known.step for known in checkpoints]
        kept = self._checkpoints.kept_of(steps)
        return [step in kept for step in steps]


def _forget_failed_reads() -> None:
    """Collects orbax's other failed reads, which would print their errors later."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    gc.collect()
    sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__
