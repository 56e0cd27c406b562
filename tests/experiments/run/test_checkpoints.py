"""Which checkpoints are kept, and which is the best."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.config import Config
from experiments.run import training
from experiments.run.checkpoints import UNKNOWN, CheckpointError, Checkpoints
from experiments.run.training import train
from experiments.step.evaluation import Evaluation
from tests.experiments.run.runs import rows_of, saved_steps


def test_the_best_checkpoint_and_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state = {"w": np.zeros(3, np.float32)}
    for step, accuracy in enumerate([0.1, 0.9, 0.9, UNKNOWN, 0.3, 0.2]):
        checkpoints.save(step, state, {}, accuracy)
        checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_arrays_of_other_values_are_not_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, {"w": jnp.arange(4.0)}, {"losses": [1.5]})
    state, progress = checkpoints.restore(3, {"w": jnp.zeros(4)})
    np.testing.assert_array_equal(state["w"], np.arange(4.0))
    assert progress == {"losses": [1.5]}
    with pytest.raises(CheckpointError, match=r"its w is float32\[4\], not float32\[5\]"):
        checkpoints.restore(3, {"w": jnp.zeros(5)})
    checkpoints.close()


@pytest.mark.usefixtures("small_mlp")
def test_a_run_keeps_and_tests_the_last_of_the_best_epochs(tmp_path, monkeypatch):
    """It evaluates each epoch, then the test part with the last and the best parameters."""
    made = training.experiment_from
    accuracies, tested = iter([0.3, 0.5, 0.5, 0.4, 0.8, 0.9]), []

    def evaluate(params, stats, feed):
        tested.append((feed.examples, np.asarray(params["head"]["bias"])))
        return Evaluation(next(accuracies), 1.0)

    def experiment_from(config, folder):
        return dataclasses.replace(made(config, folder), evaluate=evaluate)

    monkeypatch.setattr(training, "experiment_from", experiment_from)
    options = {"epochs": 4, "batch_size": 8, "train_examples": 40, "method": "sgd", "devices": 1}
    options |= {"checkpoint_every": 4, "keep_checkpoints": 2}
    summary = train(Config(output=tmp_path / "run", **options))
    # Saved were 4, 5 (best), 8, 10 (best), 12, 15 (best), 16 and 20 (last).
    assert saved_steps(tmp_path / "run") == [15, 16, 20]
    assert (summary["checkpoint_epoch"], summary["validation_accuracy"]) == (3, 0.5)
    assert (summary["test_accuracy"], summary["test_examples"]) == (0.9, 360)
    assert summary["last_test_accuracy"] == 0.8
    assert [examples for examples, _ in tested] == [180] * 4 + [360] * 2
    np.testing.assert_array_equal(tested[-1][1], tested[2][1])
    np.testing.assert_array_equal(tested[-2][1], tested[3][1])
    assert [row["step"] for row in rows_of(tmp_path / "run")] == ["5", "10", "15", "20"]


def test_the_usual_interval_is_an_epoch_or_ten_of_the_digits():
    class Experiment:
        steps_per_epoch = 39

        class recipe:  # noqa: N801
            dataset = "digits"

    assert training._usual_interval(Experiment) == 390
    Experiment.recipe.dataset = "cifar10:3.0.2"
    assert training._usual_interval(Experiment) == 39
