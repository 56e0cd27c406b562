"""The grid of a comparison."""

import pytest

from experiments.config import ArgumentError
from experiments.sweep import Sweep, gradients_of, label_of, method_of


def counts(**options):
    """How many runs there are of each method and number of epochs."""
    result, sweep = {}, Sweep(epochs=10, **options)
    runs = sweep.configs()
    for run in runs + sweep.longer_plain(runs, steps_per_epoch=39):
        name = label_of(run.method, run.perturbation), run.epochs
        result[name] = result.get(name, 0) + 1
    return result


def test_a_method_has_its_own_hyperparameters():
    grid = {"rho": (0.1, 0.2, 0.3), "mu": (1.0, 5.0), "gsam_alpha": (0.1,), "seeds": 4}
    methods = ("sgd", "sam", "bisam-tanh", "gsam+log")
    assert counts(methods=methods, equal_gradients=False, **grid) == {
        ("sgd", 10): 4,
        ("sam", 10): 12,
        ("bisam-tanh", 10): 24,
        ("gsam+log", 10): 24,
    }


def test_plain_training_gets_the_gradients_of_every_other_method():
    methods = ("sam", "sgd", "gsam+log", "bilateral", "tilted")
    found = counts(methods=methods, num_samples=(2, 4), seeds=1)
    plain = {epochs: count for (method, epochs), count in found.items() if method == "sgd"}
    assert plain == {10: 1, 20: 1, 30: 1, 40: 1, 80: 1}
    assert set(counts(methods=("sam", "gsam"))) == {("sam", 10), ("gsam", 10)}
    found = counts(methods=("sgd", "look", "look+log"), look_every=(2, 5, 100), seeds=1)
    plain = {epochs for method, epochs in found if method == "sgd"}
    assert plain == {10, 12, 14, 15, 20}


def test_plain_steps_take_one_gradient():
    options = {"methods": ("sgd", "gsam", "gsam+log"), "seeds": 1}
    late = counts(**options, start_step=195)
    assert {epochs for method, epochs in late if method == "sgd"} == {10, 15, 20}
    now_and_then = counts(**options, every=5)
    assert {epochs for method, epochs in now_and_then if method == "sgd"} == {10, 12, 14}
    runs = Sweep(**options, start_step=20, every=3).configs()
    assert {(run.method, run.start_step, run.every) for run in runs} == {
        ("sgd", 0, 1),
        ("gsam", 20, 3),
    }
    (run,) = Sweep(methods=("gsam",), seeds=1, start_step=20, every=3).configs()
    # Of 30 steps 20, 23, 26 and 29.
    assert gradients_of(run, 30) == pytest.approx(1 + 4 / 30)
    assert gradients_of(run, 20) == 1
    with pytest.raises(ArgumentError, match="--start-step cannot be used with --method sampa"):
        Sweep(methods=("sgd", "sampa"), start_step=20)


def test_runs_that_share_a_program_are_neighbours():
    runs = Sweep(methods=("tilted",), num_samples=(2, 3), rho=(0.1, 0.2), seeds=2).configs()
    assert [run.num_samples for run in runs] == [2] * 4 + [3] * 4


def test_seeds_pair_the_methods():
    runs = Sweep(methods=("sgd", "asam"), seeds=3, label_noise=0.2).configs()
    for method in ("sgd", "asam"):
        assert {run.seed for run in runs if run.method == method} == {0, 1, 2}
    assert {run.label_noise for run in runs} == {0.2}


@pytest.mark.parametrize(
    ("name", "label", "gradients"),
    [
        ("sgd", "sgd", 1),
        ("sam", "sam", 2),
        ("sam+log", "bisam-log", 2),
        ("bisam-tanh", "bisam-tanh", 2),
        ("gsam", "gsam", 2),
        ("gsam+tanh", "gsam+tanh", 3),
        ("bilateral", "bilateral", 3),
        ("bilateral+log", "bilateral+log", 4),
        ("tilted+log", "tilted+log", 6),
        ("efficient", "efficient", 2),
        ("sampa+log", "sampa+log", 3),
        ("look", "look", 1.2),
        ("look+log", "look+log", 1.4),
        ("weighted", "weighted", 2),
        ("weighted+log", "weighted+log", 3),
        ("functional+tanh", "functional+tanh", 2),
    ],
)
def test_names(name, label, gradients):
    assert label_of(*method_of(name)) == label
    (run, *_) = Sweep(methods=(name,), seeds=1).configs()
    assert gradients_of(run, 100) == gradients


@pytest.mark.parametrize("name", ["sgd+log", "bisam-log+log", "sam+ce", "sam+", "SAM", ""])
def test_names_that_are_none(name):
    if name == "sam+":
        assert method_of(name) == ("sam", None)
        return
    with pytest.raises(ArgumentError, match="--methods has no"):
        Sweep(methods=(name,))
