"""The family's numbers, as the authors' own implementations give them, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    bilateral_sam,
    efficient_sam,
    friendly_sam,
    gsam,
    sam,
    sampa,
    sparse_sam_dynamic,
    sparse_sam_fisher,
    tilted_sam,
)
from tests.published import (
    CASES,
    GOLDEN,
    TOLERANCE,
    assert_close,
    base_optimizer,
    logits_and_stats,
    smooth_cross_entropy,
    tree_of,
)

# The sparse and the efficient code add 1e-7 to the gradient's norm.
LOOSE = 1e-8

pytestmark = pytest.mark.usefixtures("float64")


class Case:
    """One golden file: its numbers, its losses, and a loop over its steps."""

    def __init__(self, name, tolerance=TOLERANCE):
        self.golden = np.load(GOLDEN / f"{name}.npz")
        self.hyperparameters = CASES[name]["hyperparameters"]
        self.base = base_optimizer(self.hyperparameters)
        self.tolerance = tolerance

    def tree(self, prefix, *index):
        return {
            leaf: value[index] if index else value
            for leaf, value in tree_of(self.golden, prefix).items()
        }

    def batch(self, t):
        return jnp.asarray(self.golden["batch/x"][t]), jnp.asarray(self.golden["batch/y"][t])

    def losses(self, params, batch):
        logits, _ = logits_and_stats(params, batch[0])
        return smooth_cross_entropy(logits, batch[1], self.hyperparameters["label_smoothing"])

    def loss(self, params, batch):
        return self.losses(params, batch).mean()

    def check(self, actual, prefix, *index):
        for leaf, expected in self.tree(prefix, *index).items():
            assert_close(actual[leaf], expected, f"{prefix} {leaf} {index}", self.tolerance)

    def run(self, tx, state=None, extra_args=lambda t, params, state: {}, after=None):
        """Steps through the file; `extra_args` and `after` see each step."""
        params = self.tree("init")
        state = tx.init(params) if state is None else state
        base_state = self.base.init(params)
        for t in range(len(self.golden["batch/x"])):
            batch = self.batch(t)
            ascent = jax.grad(self.loss)(params, batch)
            arguments = {"loss_fn": functools.partial(self.loss, batch=batch)}
            arguments |= extra_args(t, params, state)
            grads, state = tx.update(ascent, state, params, **arguments)
            self.check(grads, "descent_grad", t)
            updates, base_state = self.base.update(grads, base_state, params)
            params = optax.apply_updates(params, updates)
            self.check(params, "traj", t + 1)
            if after is not None:
                after(t, state)


def test_gsam():
    case = Case("gsam_mlp")
    case.run(gsam(case.hyperparameters["rho"], case.hyperparameters["alpha"]))


def test_bilateral():
    case = Case("bilateral_intended_mlp")
    case.run(bilateral_sam(case.hyperparameters["rho_max"], case.hyperparameters["rho_min"]))


def test_friendly():
    case = Case("friendly_mlp")
    h = case.hyperparameters

    def after(t, state):
        case.check(optax.tree.get(state, "mean_gradient"), "ema_grad", t)

    case.run(friendly_sam(h["rho"], h["sigma"], h["lmbda"]), after=after)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", ["tsam_lo_mlp", "tsam_hi_mlp"])
def test_tilted(name, together):
    case = Case(name)
    h = case.hyperparameters
    tx = tilted_sam(
        h["rho"], h["tilt"], h["num_samples"], h["radius"], h["scaling"], together=together
    )
    case.run(
        tx, extra_args=lambda t, params, state: {"noise": case.tree("noise_standard_normal", t)}
    )


def test_sparse_fisher_with_the_stale_gradient_of_the_published_code():
    case = Case("ssam_fisher_mlp", LOOSE)
    h = case.hyperparameters
    updates_after = np.flatnonzero(case.golden["mask_updated"])
    every = int(np.diff(updates_after)[0])
    # Published: no mask at first, and a new one after the steps 0, `every`, 2 * `every`.
    tx = sparse_sam_fisher(h["rho"], h["sparsity"], update_every=every)
    start = tx.init(case.tree("init"))
    state = optax.tree.set(start, fisher_count=jnp.asarray(every - 1, jnp.int32))

    def scores(t, params):
        number = list(updates_after).index(t - 1)
        x, y = case.golden["fisher/x"][number], case.golden["fisher/y"][number]

        def cross_entropy(params, i):
            logits, _ = logits_and_stats(params, jnp.asarray(x[i : i + 1]))
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[i : i + 1])[0]

        gradients = [jax.grad(cross_entropy)(params, i) for i in range(len(x))]
        gradients[0] = optax.tree.add(gradients[0], case.tree("descent_grad", t - 1))
        squares = [jax.tree.map(jnp.square, gradient) for gradient in gradients]
        return functools.reduce(optax.tree.add, squares)

    def extra_args(t, params, state):
        case.check_mask = case.tree("mask", t)
        if t - 1 in updates_after:
            return {"fisher_scores_fn": lambda params: scores(t, params)}
        return {"fisher_scores_fn": lambda params: params}

    def after(t, state):
        mask = optax.tree.get(state, "fisher_mask")
        for leaf, expected in case.tree("mask", t).items():
            np.testing.assert_array_equal(mask[leaf], expected.astype(bool))

    case.run(tx, state, extra_args, after)


def test_sparse_dynamic():
    case = Case("ssam_dynamic_mlp", LOOSE)
    h = case.hyperparameters
    steps = len(case.golden["batch/x"])
    every = steps // h["epochs"]

    def drop_rate(count):
        epoch = (count // every).astype(jnp.float64)
        return h["drop_rate"] * 0.5 * (1 + jnp.cos(jnp.pi * epoch / h["epochs"]))

    tx = sparse_sam_dynamic(h["rho"], h["sparsity"], drop_rate, update_every=every)
    masks = jax.tree.map(lambda m: m.astype(bool), case.tree("mask"))
    first = jax.tree.map(lambda m: m[0], masks)
    state = optax.tree.set(tx.init(case.tree("init")), dynamic_mask=first)

    def extra_args(t, params, state):
        # Published here: drop the smallest gradients, grow at random.
        ascent = jax.grad(case.loss)(params, case.batch(t))
        return {
            "drop_scores": jax.tree.map(jnp.abs, ascent),
            "growth_scores": case.tree("growth_score", t // every),
        }

    def after(t, state):
        mask = optax.tree.get(state, "dynamic_mask")
        for leaf in mask:
            np.testing.assert_array_equal(mask[leaf], masks[leaf][t + 1])

    case.run(tx, state, extra_args, after)


def test_efficient():
    case = Case("esam_mlp", LOOSE)
    h = case.hyperparameters
    examples = case.golden["batch/y"].shape[1]
    # Published: strictly above the k-th largest rise, so one example less than k.
    kept = int(examples * h["gamma"]) - 1
    assert (case.golden["selected"].sum(-1) == kept).all()
    tx = efficient_sam(h["rho"], h["beta"], kept / examples)

    def extra_args(t, params, state):
        x, y = case.batch(t)

        def example_losses_fn(params, indices):
            chosen = (x, y) if indices is None else (x[indices], y[indices])
            return case.losses(params, chosen)

        return {"example_losses_fn": example_losses_fn}

    case.run(tx, extra_args=extra_args)


def test_sampa():
    case = Case("sampa_mlp")
    h = case.hyperparameters
    tx = sampa(case.base, h["rho"], h["lambda"])
    params = case.tree("init")
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, batch_loss_fn=case.loss))
    for t in range(len(case.golden["batch/x"])):
        updates, state = update(
            None, state, params, batch=case.batch(t), previous_batch=case.batch(max(t - 1, 0))
        )
        params = optax.apply_updates(params, updates)
        case.check(state.lookahead_gradient, "ascent_grad", t)
        case.check(params, "traj", t + 1)


def test_momentum_sam_is_a_step_along_minus_the_momentum():
    """Momentum-SAM needs no name of its own: its ascent gradient is minus the momentum."""
    case = Case("msam_mlp")
    h = case.hyperparameters
    tx, base = sam(h["rho"]), optax.sgd(h["lr"], momentum=h["momentum"])
    params = case.tree("clean_traj", 0)
    state, base_state = tx.init(params), base.init(params)
    for t in range(len(case.golden["batch/x"])):
        batch = case.batch(t)
        points = []

        def grad_fn(point, batch=batch, points=points):
            points.append(point)
            # Weight decay at the perturbed weights, as published.
            decay = optax.tree.scale(h["weight_decay"], point)
            return optax.tree.add(jax.grad(case.loss)(point, batch), decay)

        momentum = optax.tree.get(base_state, "trace")
        ascent = optax.tree.scale(-1.0, momentum)
        grads, state = tx.update(ascent, state, params, grad_fn=grad_fn)
        case.check(points[0], "traj", t)
        updates, base_state = base.update(grads, base_state)
        params = optax.apply_updates(params, updates)
        case.check(params, "clean_traj", t + 1)
        case.check(optax.tree.get(base_state, "trace"), "momentum_buffer", t)
