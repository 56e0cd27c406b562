import jax
import pytest

from experiments import compare, train
from tests.experiments.small import patch_mlp

# Small, but with everything: two methods, two radii, two seeds, wrong labels.
TASK = ["--train-examples", "128", "--epochs", "2", "--label-noise", "0.2", "--rho"]
GRID = ["--methods", "sgd", "sam", "--seeds", "2", *TASK, "0.1", "0.5", "--no-equal-gradients"]


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """A folder with the comparison "grid" and the runs "run0" and "run1", all finished."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch_mlp(patch)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            compare.main([*GRID, "--output", str(folder / "grid")])
            for seed in ("0", "1"):
                run = ["--method", "bisam-log", "--seed", seed, *TASK, "0.1", "--devices", "1"]
                train.main([*run, "--output", str(folder / f"run{seed}")])
    return folder
