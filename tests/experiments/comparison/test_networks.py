"""The networks of a comparison are those of the best epochs, each under its run."""

import types

import numpy as np

from experiments.comparison.grid import Grid
from experiments.comparison.networks import Kept, keep, read_networks
from experiments.comparison.replicas import Population


def test_the_best_networks_are_kept_each_under_its_run(tmp_path):
    runs = Grid(methods=("sam",), rho=(0.1, 0.2), seeds=2).recipes
    best = {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2)}
    state = types.SimpleNamespace(params={"w": -best["w"]}, stats={"m": np.full(4, -1.0)})
    stats = {"m": np.arange(4.0, dtype=np.float32)}
    # Two parts of the comparison; the second is filled up with a copy of its last run.
    keep(tmp_path, "one", runs[:3], Population(state, np.zeros(4), best, stats))
    later = {"w": best["w"] + 100}
    keep(tmp_path, "two", runs[3:], Population(state, np.zeros(4), later, stats))

    like = Kept({"w": np.zeros(2, np.float32)}, {"m": np.zeros((), np.float32)})
    found = read_networks(tmp_path, [runs[3], runs[1], runs[0]], like)
    np.testing.assert_array_equal(found.params["w"], [[100, 101], [2, 3], [0, 1]])
    np.testing.assert_array_equal(found.stats["m"], [0, 1, 0])
    other = Grid(methods=("sam",), rho=(0.3,), seeds=1).recipes
    assert read_networks(tmp_path, [runs[0], *other], like) is None
