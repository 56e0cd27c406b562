"""`experiments.compare` in this process, on comparisons that take seconds."""

import contextlib

import jax
import pytest

from experiments import compare
from experiments.comparison import capacity
from experiments.comparison.replicas import Replicas
from experiments.config.hyperparameters import STRUCTURAL
from tests.experiments.script import call
from tests.experiments.small import patch_mlp

SMALL = ["--train-examples", 96, "--seeds", 2, "--label-noise", 0.3]
_programs = {}


def run(capsys, *args):
    return call(compare.main, capsys, *args)


@contextlib.contextmanager
def quickly():
    """Compiles quickly, and compiles equal programs of `SMALL` comparisons once."""

    def made_once(experiment, count, *, at_once, devices):
        recipe = experiment.recipe
        # What seeds and other hyperparameters change is an input of the program.
        structural = [recipe.hyperparameters.get(name) for name in STRUCTURAL]
        images = experiment.dataset.train.images.tobytes()
        key = repr((recipe.label, recipe.epochs, structural, count, at_once, devices)), images
        if key not in _programs:
            _programs[key] = Replicas(experiment, count, at_once=at_once, devices=devices)
        return _programs[key]

    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(capacity, "Replicas", made_once)
        patch_mlp(patch)
        yield
