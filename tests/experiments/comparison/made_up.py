"""Results that nobody trained for."""

from experiments.comparison.grid import task_of
from experiments.comparison.results import FINISHED, Comparison, Result
from experiments.config.config import Config
from experiments.config.recipe import resolve

TASK = task_of(Config(), resolve(Config()))


def results_of(method="sam", *, validation, test, epochs=10, gradients=2, **values):
    """A result for each accuracy, by increasing seed. `values` are hyperparameters."""
    return [
        Result(
            method=method,
            epochs=epochs,
            seed=seed,
            values=values,
            gradients=gradients,
            steps=39 * epochs,
            status=FINISHED,
            validation_accuracy=of_validation,
            checkpoint_epoch=epochs,
            test_accuracy=of_test,
            last_test_accuracy=of_test - 0.01,
            milliseconds_per_step=0.5,
            runs_at_once=8,
            curve=[],
        )
        for seed, (of_validation, of_test) in enumerate(zip(validation, test, strict=True))
    ]


def eight(method, accuracy, *, spread=0.01, **options):
    """Eight results around an accuracy, of validation and test."""
    accuracies = [accuracy + spread * (seed % 3) for seed in range(8)]
    return results_of(method, validation=accuracies, test=accuracies, **options)


SGD = eight("sgd", 0.5, gradients=1)
SGD_LONGER = eight("sgd", 0.6, epochs=20, gradients=1)
SAM = eight("sam", 0.7, rho=0.1)


def comparison_of(*groups, task=TASK, command="the command"):
    """A comparison of all results in `groups`."""
    about = {
        "command": command,
        "versions": {"jax": "1.2.3"},
        "hardware": {"device": "abacus"},
        "task": task,
    }
    return Comparison(task, [result for group in groups for result in group], [about])
