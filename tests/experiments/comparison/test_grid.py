"""The runs of a grid."""

import collections

import pytest

from experiments.comparison.grid import Grid, parsed
from experiments.config.methods import label_of
from experiments.system.command_line import ArgumentError


def counts(**options):
    """How many runs there are of each method and number of epochs."""
    grid = Grid(epochs=10, **options)
    recipes = grid.recipes
    recipes += grid.longer_plain(recipes, steps_per_epoch=39)
    return collections.Counter((recipe.label, recipe.epochs) for recipe in recipes)


def epochs_of_plain(**options):
    return [epochs for method, epochs in counts(seeds=1, **options) if method == "sgd"]


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
    assert epochs_of_plain(methods=methods, num_samples=(2, 4)) == [10, 20, 30, 40, 80]
    assert set(counts(methods=("sam", "gsam"))) == {("sam", 10), ("gsam", 10)}
    methods = ("sgd", "look", "look+log")
    assert epochs_of_plain(methods=methods, look_every=(2, 5, 100)) == [10, 12, 14, 15, 20]
    # From every seed.
    assert counts(methods=("sgd", "sam"), seeds=3)["sgd", 20] == 3


def test_plain_steps_take_one_gradient():
    options = {"methods": ("sgd", "gsam", "gsam+log")}
    assert epochs_of_plain(**options, start_step=195) == [10, 15, 20]
    assert epochs_of_plain(**options, every=5) == [10, 12, 14]
    recipes = Grid(**options, seeds=1, start_step=20, every=3).recipes
    assert {(recipe.method, recipe.start_step, recipe.every) for recipe in recipes} == {
        ("sgd", 0, 1),
        ("gsam", 20, 3),
    }
    # Perturbed are the steps 20, 23, 26 and 29.
    assert recipes[1].gradients_per_step(30) == pytest.approx(1 + 4 / 30)
    assert recipes[1].gradients_per_step(20) == 1


def test_runs_that_share_a_program_are_neighbors():
    grid = Grid(methods=("tilted",), num_samples=(2, 3), rho=(0.1, 0.2), seeds=2)
    samples = [recipe.hyperparameters["num_samples"] for recipe in grid.recipes]
    assert samples == [2] * 4 + [3] * 4


def test_seeds_pair_the_methods():
    grid = Grid(methods=("sgd", "asam"), seeds=3, first_seed=5, label_noise=0.2)
    recipes = grid.recipes
    for method in ("sgd", "asam"):
        assert [recipe.seed for recipe in recipes if recipe.method == method] == [5, 6, 7]
    assert {recipe.label_noise for recipe in recipes} == {0.2}


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
    method, perturbation = parsed(name)
    assert label_of(method, perturbation or "ce") == label
    grid = Grid(methods=(name,), seeds=1)
    assert grid.labels == [label]
    (recipe,) = grid.recipes
    assert recipe.label == label
    assert recipe.gradients_per_step(100) == gradients


@pytest.mark.parametrize("name", ["sgd+log", "bisam-log+log", "sam+ce", "SAM", ""])
def test_names_of_nothing(name):
    with pytest.raises(ArgumentError, match="--methods has no"):
        Grid(methods=(name,))
