"""The runs of a grid."""

import collections
import itertools

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
    methods = ("sgd", "gsam@start-step=195", "gsam+log@every=5")
    assert epochs_of_plain(methods=methods) == [10, 14, 15]
    recipes = Grid(methods=("sgd", "gsam@start-step=20@every=3"), seeds=1).recipes
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
        ("sam@group-size=8", "sam@group-size=8", 2),
        ("sam@group-size=32", "sam", 2),
        ("sam+log@every=5@start-step=0", "bisam-log@every=5", 1.2),
        ("bisam-log@every=5@start-step=50", "bisam-log@start-step=50@every=5", 1.1),
    ],
)
def test_names(name, label, gradients):
    method, perturbation, _ = parsed(name)
    assert label_of(method, perturbation or "ce") == label.split("@")[0]
    grid = Grid(methods=(name,), seeds=1)
    assert grid.labels == [label]
    (recipe,) = grid.recipes
    assert recipe.label == label
    assert recipe.gradients_per_step(100) == gradients


@pytest.mark.parametrize(
    "setting", ["every", "every=", "every=x", "every=-1", "rho=1", "every=2@every=3", ""]
)
def test_options_of_nothing(setting):
    with pytest.raises(ArgumentError, match=r"after @ comes each of group-size, start-step, every"):
        Grid(methods=(f"sam@{setting}",))


def test_options_that_a_method_cannot_follow():
    for name, message in {
        "sgd@every=2": "--every has no meaning for --method sgd",
        "sampa@start-step=9": "--start-step cannot be used with --method sampa",
        "sam@group-size=5": "--group-size must divide --batch-size, got 5 and 32",
        "sam@every=0": "--every must be finite, at least 1, got 0",
    }.items():
        with pytest.raises(ArgumentError, match=message):
            Grid(methods=(name,))
    with pytest.raises(ArgumentError, match="--methods has sam@every=2 twice"):
        Grid(methods=("sam@every=2", "sam@every=2@group-size=32"))


def test_every_method_gets_the_same_number_of_trials():
    values = {"rho": (0.1, 0.2, 0.5), "learning_rate": (0.03, 0.1), "weight_decay": (0.0, 1e-3)}
    grid = Grid(methods=("sgd", "sam"), **values, trials=4, seeds=2)
    tried = collections.defaultdict(dict)
    for recipe in grid.recipes:
        tried[recipe.label].setdefault(tuple(recipe.hyperparameters.values()), []).append(
            recipe.seed
        )
    assert [len(known) for known in tried.values()] == [4, 4]
    assert all(seeds == [0, 1] for known in tried.values() for seeds in known.values())
    # The same in every run of the command, and a part of the whole grid.
    again = Grid(methods=("sgd", "sam"), **values, trials=4, seeds=2).recipes
    assert [recipe.key for recipe in again] == [recipe.key for recipe in grid.recipes]
    whole = {recipe.key for recipe in Grid(methods=("sgd", "sam"), **values, seeds=2).recipes}
    assert {recipe.key for recipe in grid.recipes} < whole
    with pytest.raises(ArgumentError, match=r"at most the 4 combinations of values of sgd, got 5"):
        Grid(methods=("sam", "sgd"), **values, trials=5)


def test_trials_use_all_values_equally_often():
    values = {
        "rho": (0.1, 0.3, 1.0),
        "learning_rate": (0.03, 0.1, 0.3),
        "weight_decay": (0.0, 1e-3, 2e-3),
    }
    grid = Grid(methods=("sam",), **values, trials=9, seeds=1)
    tried = [{name: recipe.hyperparameters[name] for name in values} for recipe in grid.recipes]
    for name in values:
        counts = collections.Counter(combination[name] for combination in tried)
        assert counts == dict.fromkeys(values[name], 3)
    for one, other in itertools.combinations(values, 2):
        assert len({(combination[one], combination[other]) for combination in tried}) == 9


def test_seeds_that_confirm_have_not_chosen():
    grid = Grid(methods=("sam",), seeds=3, first_seed=4, confirm=5)
    assert list(grid.search_seeds) == [4, 5, 6] == [recipe.seed for recipe in grid.recipes]
    assert list(grid.fresh_seeds) == [7, 8, 9, 10, 11]
    assert not Grid(methods=("sam",)).fresh_seeds


@pytest.mark.parametrize("name", ["sgd+log", "bisam-log+log", "sam+ce", "SAM", ""])
def test_names_of_nothing(name):
    with pytest.raises(ArgumentError, match="--methods has no"):
        Grid(methods=(name,))
