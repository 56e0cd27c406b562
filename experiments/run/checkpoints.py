"""Checkpoints of a run: everything needed to resume it bit for bit."""

import gc
import re
import sys
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

# Orbax warns about intended uses, such as only reading.
absl.logging.set_verbosity(absl.logging.ERROR)

ACCURACY = "validation_accuracy"
# Below every accuracy: such a checkpoint is the best only if there is no other.
UNKNOWN = -1.0


class CheckpointError(Exception):
    """A checkpoint that cannot be read or belongs to another run."""


class Checkpoints:
    """The latest checkpoints of a run and the best one.

    They are written in the background. A checkpoint appears under its step when it is complete.

    Args:
        folder: folder of the checkpoints, made if it does not exist. Remains of an interrupted
            write are removed.
        keep: number of latest checkpoints to keep, in addition to the best; None to only read and
            change nothing in the folder.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder
        # Orbax takes the later of two equals, which is trained longer.
        best = checkpoint_managers.BestN(get_metric_fn=_accuracy, n=1)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep), best]
        )
        read_only = keep is None
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_accuracy,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

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
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave(progress),
                fingerprints=ocp.args.JsonSave(_fingerprints(state)),
            ),
            metrics={ACCURACY: accuracy},
        )

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the last step of the highest accuracy, or None without checkpoints."""
        self.wait()
        return self._manager.best_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state and the progress at `step`.

        Args:
            step: one of :meth:`steps`.
            like: a state of the same structure, shapes and dtypes.

        Raises:
            CheckpointError: if the checkpoint is damaged, or its state is not like `like`.
        """
        self.wait()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        small = ocp.args.Composite(
            progress=ocp.args.JsonRestore(), fingerprints=ocp.args.JsonRestore()
        )
        large = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            # Two reads: orbax prints a long report if one of several items fails.
            known = self._manager.restore(step, args=small)
            state = self._manager.restore(step, args=large)["state"]
            # The arrays' files have no checksum.
            if _fingerprints(state) == known["fingerprints"]:
                return state, known["progress"]
            reason = "the arrays are not those that were saved"
        # A damaged file can make the readers raise anything.
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # Another process may be gone.
            reason = _first_line(error)
        _forget_failed_reads()
        raise CheckpointError(
            f"the checkpoint {self.folder / str(step)} is damaged or of another run: remove it to "
            f"resume from an earlier one ({reason})"
        )

    def parameters(self, step: int) -> dict[str, np.ndarray]:
        """Returns the parameters at `step`, of whatever network, by their names in the tree.

        They may have been saved on other devices.

        Raises:
            CheckpointError: if the checkpoint is damaged.
        """
        self.wait()
        try:
            known = self._manager.restore(
                step, args=ocp.args.Composite(fingerprints=ocp.args.JsonRestore())
            )
            params = _read_parameters(self.folder.resolve() / str(step) / "state")
            sums = {_name_of(path): sum_ for path, sum_ in known["fingerprints"].items()}
            found = {
                _name_of(path): sum_ for path, sum_ in _fingerprints({"params": params}).items()
            }
            if found.items() <= sums.items():
                return by_name(params)
            reason = "the arrays are not those that were saved"
        except Exception as error:  # see restore
            reason = _first_line(error)
        _forget_failed_reads()
        raise CheckpointError(f"the checkpoint {self.folder / str(step)} is damaged ({reason})")

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and ends the background work."""
        self._manager.close()


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by names like "blocks.0.kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name_of(jax.tree_util.keystr(path)): leaf for path, leaf in leaves}


def _name_of(path: str) -> str:
    return ".".join(re.findall(r"\w+", path))


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


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics[ACCURACY]


def _fingerprints(tree: Any) -> dict[str, int]:
    """Returns a hash of the bits of each array, the same for any layout over devices."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = _sums_of_bits([leaf for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path): int(sum_) for (path, _), sum_ in zip(leaves, sums, strict=True)
    }


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    def sum_of_bits(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jax.lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")
        bits = leaf.astype(jnp.uint32).ravel()
        # Odd weights keep every bit. Different weights detect swapped values.
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return (bits * weights).sum(dtype=jnp.uint32)

    return [sum_of_bits(leaf) for leaf in leaves]


def _forget_failed_reads() -> None:
    """Collects orbax's other failed reads, which would print their errors later."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    gc.collect()
    sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__
