"""Recipes for several devices and hosts, and for checkpoints of the scripts."""

import jax
import numpy as np
import optax
import pytest

import bisam_jax
from tests.recipes.pages import (
    PARAMS,
    TWO_LAYERS,
    a_batch,
    after_bisam,
    assert_close,
    names_of,
    q,
    reference,
    softmax_losses,
)


def test_pmap():
    names, batch = names_of("pmap"), a_batch()
    given = names["split"](batch)
    params, _, _ = names["train_step"](PARAMS, names["tx"].init(PARAMS), given)
    assert_close(params, after_bisam(batch))


def test_shard_map():
    names, batch = names_of("shard_map"), a_batch()
    params, _, _ = names["train_step"](PARAMS, names["tx"].init(PARAMS), batch)
    assert_close(params, after_bisam(batch))


def test_fsdp():
    names, batch = names_of("fsdp"), a_batch()
    params = TWO_LAYERS
    placed = names["place"](params)
    after, _, _ = names["train_step"](placed, names["tx"].init(placed), names["place"](batch))
    assert after["w"].sharding.spec == placed["w"].sharding.spec
    assert len(after["w"].sharding.device_set) == jax.device_count()
    losses = [names["of_logits"](loss) for loss in names["losses"]]
    assert_close(after, reference(params, batch, bisam_jax.bisam(0.05), optax.adamw(1e-2), *losses))


@pytest.mark.slow
def test_several_hosts():
    names, batch = names_of("several-hosts"), a_batch()
    params, state = names["params"], names["state"]
    rows = names["global_batch"](jax.tree.map(np.asarray, batch))
    after, _, _ = names["train_step"](params, state, rows)
    base = optax.sgd(0.1, momentum=0.9)
    assert_close(after, reference(params, batch, bisam_jax.bisam(0.05), base, softmax_losses, q))


@pytest.mark.slow
def test_checkpoints(tmp_path, monkeypatch):
    from experiments import train

    monkeypatch.chdir(tmp_path)
    train.main(["--epochs", "2", "--devices", "1", "--output", "runs/RUN"])
    names = names_of("checkpoints")
    assert names["logits"].shape == (10, 10)
    labels = names["dataset"].test.labels[:10]
    assert (names["logits"].argmax(-1) == labels).mean() > 0.7
    assert 0.7 < names["measured"]["test"]["accuracy"] <= 1
