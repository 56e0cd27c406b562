"""Results as files, from made-up results and run folders."""

import dataclasses

import pytest

from experiments.comparison import results
from experiments.comparison.merging import merged
from experiments.comparison.reading import read_results
from experiments.comparison.results import DIVERGED, FINISHED, Comparison
from experiments.config.config import Config
from experiments.config.recipe import filled_in, resolve
from experiments.run.folder import RunFolder, Summary, as_json
from experiments.system import seals
from experiments.system.command_line import ArgumentError
from tests.experiments.comparison.made_up import SAM, SGD, TASK, comparison_of, eight

CURVE = [
    {"epoch": 1, "loss": 1.5, "validation_accuracy": 0.25, "validation_loss": 2.0},
    {"epoch": 2, "loss": 0.1, "validation_accuracy": 0.5, "validation_loss": float("inf")},
]


FINITE = [CURVE[0], CURVE[1] | {"validation_loss": 1.0}]


def test_what_is_written_is_read(tmp_path):
    diverged = dataclasses.replace(
        eight("look", 0.5, rho=1e30, look_every=2.0, gradients=1.5)[3],
        status=DIVERGED,
        validation_accuracy=None,
        checkpoint_epoch=None,
        test_accuracy=None,
    )
    known = comparison_of([*SGD, dataclasses.replace(SAM[0], curve=CURVE), diverged])
    results.write_merged(tmp_path, [known])
    (there,) = read_results(tmp_path)
    assert there == known
    # A copy of results may lack the largest file.
    (tmp_path / "curves.csv").unlink()
    (there,) = read_results(tmp_path)
    assert [result.key for result in there.results] == [result.key for result in known.results]


def test_one_comparison_per_task(tmp_path):
    noisy = TASK | {"label_noise": 0.2}
    parts = [
        comparison_of(SGD, command="first"),
        comparison_of(SAM, task=noisy, command="noisy"),
        comparison_of(SGD, SAM, command="second"),
    ]
    clean, other = merged(parts)
    assert clean == Comparison(TASK, [*SGD, *SAM], [parts[0].origins[0], parts[2].origins[0]])
    assert other == Comparison(noisy, SAM, parts[1].origins)
    # Each has a folder.
    results.write_merged(tmp_path, [clean, other])
    assert read_results(tmp_path) == [clean, other]


def test_results_that_differ_are_refused():
    changed = [*SAM[:5], dataclasses.replace(SAM[5], test_accuracy=0.1)]
    with pytest.raises(ArgumentError, match="two results of sam with seed 5 that differ"):
        merged([comparison_of(SAM), comparison_of(changed)])


def test_a_comparison_of_an_older_version_lacks_options(tmp_path):
    task = {name: value for name, value in TASK.items() if name != "precision"}
    # It recorded what is part of a method now.
    task |= {"group_size": 32, "start_step": 0, "every": 1}
    results.write_merged(tmp_path, [comparison_of(SGD, task=task)])
    assert read_results(tmp_path)[0].task == TASK


@pytest.mark.parametrize(("name", "value"), [("group_size", 8), ("every", 32), ("start_step", 32)])
def test_methods_of_an_older_version_are_not_mixed_with_others(name, value, tmp_path):
    results.write_merged(tmp_path, [comparison_of(SGD, task=TASK | {name: value})])
    with pytest.raises(
        ArgumentError, match=f"its runs with {name} {value} are of an older version"
    ):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("comparison.json", None, "[", "comparison.json cannot be read: Input data was truncated"),
        ("comparison.json", None, "[]", "comparison.json cannot be read: expected an object"),
        ("comparison.json", None, "{}", "comparison.json cannot be read: Object missing required"),
        ("runs.csv", None, "run\n", r"runs.csv cannot be read: the column 'method' is missing"),
        ("runs.csv", "run,", "run,x,", "runs.csv cannot be read: unknown column 'x'"),
        ("runs.csv", "\n0,", "\nzero,", r"runs.csv cannot be read: line 2: Expected `int`"),
        ("runs.csv", "\n1,", "\n1,1,", r"runs.csv cannot be read: line 3: expected \d+ cells"),
        ("runs.csv", "finished", "done", r"runs.csv cannot be read: line 2: Invalid enum value"),
        ("runs.csv", "finished", "", r"line 2: Object missing required field `status`"),
        ("runs.csv", "0.5", "inf", "runs.csv cannot be read: line 2: expected a finite number"),
        ("runs.csv", "finished", '"finished', "runs.csv cannot be read: "),
    ],
)
def test_what_cannot_be_read(name, old, new, message, tmp_path):
    results.write_merged(tmp_path, [comparison_of(SGD)])
    path = tmp_path / name
    text = path.read_text()
    assert old is None or old in text
    path.write_text(new if old is None else text.replace(old, new))
    with pytest.raises(ArgumentError, match=f"{name} was changed after it was written"):
        read_results(tmp_path)
    seals.accept(tmp_path, [results.ABOUT, results.RUNS, results.CURVES])
    with pytest.raises(ArgumentError, match=message):
        read_results(tmp_path)


def test_a_run_is_there_only_once(tmp_path):
    results.write_merged(tmp_path, [comparison_of([*SGD, SGD[0]])])
    with pytest.raises(ArgumentError, match="run 8 is there twice"):
        read_results(tmp_path)


def write_run(path, status=FINISHED, changed=(), **options):
    """A run folder as training leaves it."""
    config = Config(label_noise=0.2, epochs=2, seed=1, output=path, **options)
    folder = RunFolder.create(path, as_json(filled_in(config, resolve(config))))
    row = {"step": 1, "examples_per_second": 3200.0, "learning_rate": 0.1}
    folder.start_metrics([row | epoch for epoch in FINITE])
    folder.close()
    folder.write_summary(
        Summary(
            status=status,
            epochs_completed=2,
            epochs=2,
            steps=78,
            steps_per_epoch=39,
            checkpoint_epoch=2,
            validation_accuracy=0.5,
            test_accuracy=0.75,
            last_test_accuracy=0.5,
            test_examples=360,
            seconds=1.0,
            compile_seconds=0.5,
            peak_memory_bytes=1,
            device="abacus",
            devices=2,
            processes=1,
            versions={"jax": "1.2.3"},
            changed=list(changed),
        )
    )
    return path


def test_a_run_of_training_is_a_result(tmp_path):
    folder = write_run(tmp_path / "run", method="bisam-log", rho=0.3)
    (comparison,) = read_results(folder)
    assert comparison.task == TASK | {"label_noise": 0.2}
    (result,) = comparison.results
    assert result.key == resolve(Config(epochs=2, seed=1, rho=0.3)).key
    assert (result.status, result.steps, result.gradients) == (FINISHED, 78, 2)
    assert (result.validation_accuracy, result.checkpoint_epoch, result.test_accuracy) == (
        0.5,
        2,
        0.75,
    )
    assert result.curve == FINITE
    # 32 examples of 3200 a second.
    assert result.milliseconds_per_step == pytest.approx(10)
    assert comparison.origins[0]["hardware"] == {"device": "abacus", "devices": 2}


def test_a_run_of_training_that_diverged(tmp_path):
    folder = write_run(tmp_path / "run", "stopped: the loss is not finite", method="sam")
    ((result,),) = (known.results for known in read_results(folder))
    assert (result.status, result.validation_accuracy, result.test_accuracy) == (
        DIVERGED,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("status", "options", "message"),
    [
        ("interrupted", {}, "the run is not finished"),
        ("started", {}, "the run is not finished"),
        (
            FINISHED,
            {"batch_statistics": "per-device", "parallelism": "shard_map"},
            "per-device are another method",
        ),
    ],
    ids=["interrupted", "started", "per device"],
)
def test_runs_of_training_that_cannot_be_compared(status, options, message, tmp_path):
    folder = write_run(tmp_path / "run", status, **options)
    with pytest.raises(ArgumentError, match=message):
        read_results(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(ArgumentError, match="the run is not finished"):
        read_results(folder)


def test_a_run_that_was_changed_is_no_result(tmp_path):
    folder = write_run(tmp_path / "run", changed=["--learning-rate 0.01 from step 40"])
    with pytest.raises(ArgumentError, match="was changed when it was resumed: --learning-rate 0"):
        read_results(folder)
