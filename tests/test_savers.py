"""Every method's state survives what people save states with, and continues in another process."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import bisam_jax
from tests.methods import METHODS, UPDATING
from tests.test_front_door import ALL, BATCH, PARAMS, made, start

ROOT = Path(__file__).parents[1]


def schedule(rho):
    return bisam_jax.sam(optax.linear_schedule(rho, 0.0, 10))


def initial(name):
    """The state, or that of a ball whose radius follows a schedule."""
    return schedule(0.3).init(PARAMS) if name == "schedule" else start(name)


def through_msgpack(state, path):
    path.write_bytes(serialization.to_bytes(state))
    return serialization.from_bytes(state, path.read_bytes())


def through_pickle(state, path):
    path.write_bytes(pickle.dumps(state))
    return pickle.loads(path.read_bytes())


def through_npz(state, path):
    leaves, structure = jax.tree.flatten(state)
    with path.open("wb") as file:
        np.savez(file, *leaves)
    with np.load(path) as kept:
        return structure.unflatten([kept[f"arr_{number}"] for number in range(len(leaves))])


def through_orbax(state, path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, {"state": state, "one": jnp.ones(1)})
        saver.wait_until_finished()
        return saver.restore(path, {"state": state, "one": jnp.ones(1)})["state"]


def bits(state):
    return [
        (leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, jax.tree.leaves(state))
    ]


SAVERS = [through_msgpack, through_pickle, through_npz, through_orbax]


@pytest.mark.parametrize("save", SAVERS)
def test_states_survive(save, tmp_path):
    for number, name in enumerate([*METHODS, *UPDATING, "schedule"]):
        state = initial(name)
        for leaf in jax.tree.leaves(state):
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), name
        restored = save(state, tmp_path / str(number))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state), name


# With a key, with a mask drawn by one, and with the batch and the optimizer in the state.
CONTINUED = ("tilted", "efficient", "sparse dynamic", "sampa")


@functools.cache
def step_of(name):
    return jax.jit(made(name))


def continue_in(folder):
    """Makes a step from the state of each method in a folder, and keeps its bits."""
    for name in CONTINUED:
        state = serialization.from_bytes(start(name), (folder / name).read_bytes())
        (folder / f"{name} next").write_bytes(
            pickle.dumps(bits(step_of(name)(PARAMS, state, BATCH)))
        )


@pytest.mark.slow
def test_states_continue_in_another_process(tmp_path):
    expected = {}
    for name in CONTINUED:
        _, _, state = step_of(name)(PARAMS, start(name), BATCH)
        (tmp_path / name).write_bytes(serialization.to_bytes(state))
        expected[name] = bits(step_of(name)(PARAMS, state, BATCH))
    code = "import sys, pathlib, tests.conftest, tests.test_savers as t; "
    code += "t.continue_in(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=environment)
    for name in CONTINUED:
        assert pickle.loads((tmp_path / f"{name} next").read_bytes()) == expected[name], name
        assert name in ALL
