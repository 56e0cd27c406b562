"""Any damage of any file of a run or a comparison gives the right result, or one line."""

import random
import shutil

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import compare, evaluate, train
from experiments.run.folder import RunFolder
from tests.attacks.damage import damage, outcome, verdict
from tests.experiments.rows import read_csv
from tests.experiments.run.runs import edit, rows_of
from tests.experiments.small import patch_mlp

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TASK = ["--train-examples", 64, "--epochs", 2, "--batch-size", 16]
GRID = ["--methods", "sgd", "sam", "--seeds", 2, *TASK, "--no-equal-gradients"]
few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def as_a_user_with_a_small_mlp():
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch_mlp(patch)
        yield


@pytest.fixture(scope="module")
def run(as_a_user_with_a_small_mlp, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    args = [*TASK, "--checkpoint-every", 4, "--devices", 1, "--output", folder]
    assert outcome(train.main, *args)[0] == 0
    return folder


@pytest.fixture(scope="module")
def grid(as_a_user_with_a_small_mlp, tmp_path_factory):
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("finished") / "grid"
    assert outcome(compare.main, *GRID, "--output", folder)[0] == 0
    return folder


def read_run(run, how):
    """Reads a run; returns the outcome and what was read."""
    if how == "evaluate":
        result = outcome(evaluate.main, run)
        return result, lambda: result[1]
    if how == "compare":
        return report_of(run)
    return outcome(train.main, "--resume", run), lambda: (
        rows_of(run),
        RunFolder(run).read_summary().test_accuracy,
    )


def report_of(folder):
    output = folder.with_name("report")
    shutil.rmtree(output, ignore_errors=True)
    result = outcome(compare.main, "--from", folder, "--output", output)
    return result, lambda: (read_csv(output / "runs.csv"), (output / "1-curves.svg").exists())


@pytest.mark.slow
@few
@given(seed=st.integers(0, 2**32), how=st.sampled_from(["evaluate", "resume"]))
def test_a_damaged_run_is_evaluated_and_resumed(seed, how, run, tmp_path):
    check(seed, how, run, tmp_path)


@few
@given(seed=st.integers(0, 2**32))
def test_a_damaged_run_is_compared(seed, run, tmp_path):
    check(seed, "compare", run, tmp_path)


def check(seed, how, run, tmp_path):
    _, expected = read_run(run, how)
    expected = expected()
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    if how == "resume":
        edit(copy, "summary.json", '"finished"', '"started"')
    done = damage(copy, random.Random(seed))
    result, found = read_run(copy, how)
    assert verdict(result, lambda: found() == expected) in ("survived", "refused"), (done, result)


@pytest.mark.slow
@few
@given(seed=st.integers(0, 2**32))
def test_a_damaged_comparison(seed, grid, tmp_path):
    _, expected = report_of(grid)
    expected = expected()
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(grid, copy)
    done = damage(copy, random.Random(seed))
    result, found = report_of(copy)
    # A comparison may lack its curves.
    assert verdict(result, lambda: found()[0] == expected[0]) in ("survived", "refused"), (
        done,
        result,
    )
