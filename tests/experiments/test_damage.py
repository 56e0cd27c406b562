"""Any damage of any file of a run or a comparison gives the right result, or one line."""

import dataclasses
import functools
import random
import shutil
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import compare, evaluate, train
from experiments.comparison.reading import read_results
from experiments.run.folder import RunFolder
from experiments.system import command_line
from experiments.system.command_line import ArgumentError
from tests.attacks.damage import damage, outcome, verdict
from tests.experiments.run.runs import edit, rows_of
from tests.experiments.small import patch_mlp

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TASK = ["--train-examples", 64, "--epochs", 2, "--batch-size", 16]
GRID = ["--methods", "sgd", "sam", "--seeds", 2, *TASK, "--no-equal-gradients"]


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
    return outcome(train.main, "--resume", run), lambda: (
        rows_of(run),
        RunFolder(run).read_summary().test_accuracy,
    )


def results_of(folder):
    """Reads the results of a run or a comparison; returns the outcome and what was read."""
    found = []

    def main(args):
        try:
            (comparison,) = read_results(Path(args[0]))
        except ArgumentError as error:
            command_line.fail(str(error))
        # A copy of results may lack the curves.
        found.extend(dataclasses.replace(result, curve=[]) for result in comparison.results)

    return outcome(main, folder), lambda: found


def damaged(folder, seed, tmp_path, reads, prepare=lambda copy: None):
    """Damages a copy of a folder. It is read as the folder, or refused by one line."""
    _, expected = reads(folder)
    expected = expected()
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    prepare(copy)
    done = damage(copy, random.Random(seed))
    result, found = reads(copy)
    assert verdict(result, lambda: found() == expected) in ("survived", "refused"), (done, result)


def with_examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@with_examples(50)
@given(seed=st.integers(0, 2**32))
def test_the_results_of_a_damaged_run(seed, run, tmp_path):
    damaged(run, seed, tmp_path, results_of)


@pytest.mark.slow
@with_examples(50)
@given(seed=st.integers(0, 2**32))
def test_the_results_of_a_damaged_comparison(seed, grid, tmp_path):
    damaged(grid, seed, tmp_path, results_of)


def not_finished(copy):
    edit(copy, "summary.json", '"finished"', '"started"')


@pytest.mark.slow
@with_examples(6)
@given(seed=st.integers(0, 2**32), how=st.sampled_from(["evaluate", "resume"]))
def test_a_damaged_run_is_evaluated_and_resumed(seed, how, run, tmp_path):
    prepare = not_finished if how == "resume" else lambda copy: None
    damaged(run, seed, tmp_path, functools.partial(read_run, how=how), prepare)
