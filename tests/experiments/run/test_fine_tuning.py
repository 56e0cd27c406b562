"""Runs of which only a part is trained: frozen parameters and LoRA."""

import numpy as np
import pytest

from experiments.config.config import Config
from experiments.models.trees import flat
from experiments.run.folder import read_config
from experiments.run.restoring import accuracy_and_loss, restore
from experiments.run.training import experiment_from, train
from experiments.system.command_line import ArgumentError
from tests.experiments.run.runs import rows_of

LORA = {"lora": 2, "learning_rate": 0.05}


pytestmark = pytest.mark.usefixtures("small_mlp")


def config(output, **options):
    return Config(**{"devices": 1, "epochs": 2, "train_examples": 128, "output": output} | options)


@pytest.fixture
def earlier(tmp_path):
    folder = tmp_path / "earlier"
    train(config(folder, method="sgd", epochs=4))
    return folder


def params_of(folder):
    return flat(restore(folder).state.params)


@pytest.mark.slow
def test_a_run_with_lora_resumes_and_is_a_start_again(earlier, tmp_path, stopped_at):
    first = params_of(earlier)
    options = LORA | {"from_checkpoint": str(earlier), "method": "gsam", "perturbation": "log"}
    train(config(tmp_path / "whole", **options))
    with stopped_at(5):
        train(config(tmp_path / "stopped", **options))
    train(read_config(tmp_path / "stopped"), tmp_path / "stopped")
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    tuned = params_of(tmp_path / "whole")
    kernel = ("hidden", 0, "kernel")
    np.testing.assert_array_equal(tuned[kernel], first[kernel])
    a, b = (np.asarray(tuned["lora", "hidden", 0, name]) for name in "ab")
    assert np.abs(b).max() > 1e-4
    assert (np.asarray(tuned["head", "kernel"]) != first["head", "kernel"]).any()
    restored = restore(tmp_path / "whole")
    assert accuracy_and_loss(restored.experiment, restored.state)["test"]["accuracy"] > 0.3
    # A network without LoRA starts from the updated kernels.
    third = experiment_from(config(None, from_checkpoint=str(tmp_path / "whole")))
    start = flat(third.first_state().params)
    np.testing.assert_allclose(start[kernel], first[kernel] + a @ b, rtol=1e-6)


@pytest.mark.slow
def test_frozen_parameters_stay_what_they_are(earlier, tmp_path):
    options = {"from_checkpoint": str(earlier), "freeze": "hidden,*scale", "method": "tilted"}
    train(config(tmp_path / "run", **options))
    first, tuned = params_of(earlier), params_of(tmp_path / "run")
    for path, leaf in tuned.items():
        is_frozen = path[0] == "hidden" or path[-1] == "scale"
        if path[0] != "head":  # which begins anew
            assert (np.asarray(leaf) == first[path]).all() == is_frozen, path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "layers"}, "--freeze layers matches no parameter of mlp, whose names begin w"),
        ({"freeze": "*"}, r"--freeze \* leaves nothing to train"),
        ({"lora": 2, "model": "cnn"}, "--model cnn: it has no linear layer that LoRA could update"),
        ({"lora": -1}, "--lora must be finite, at least 0, got -1"),
        ({"perturb": "norms", "method": "tilted"}, "--perturb norms cannot be used with --method"),
        ({"perturb": "norms", "method": "sgd"}, "--perturb has no meaning for --method sgd"),
        ({"perturb": "norms", "freeze": "norms"}, "--perturb norms leaves nothing to perturb"),
    ],
    ids=["pattern", "everything", "convolutions", "rank", "noise", "plain", "both"],
)
def test_what_cannot_be_tuned(options, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        experiment_from(config(tmp_path / "run", **options))
