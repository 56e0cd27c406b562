"""The numbers of the authors' own implementations, in float64, to 1e-9."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    adaptive_l2_ball,
    asam,
    bisam,
    perturbation_loss,
    sam,
    sharpness_aware,
    tanh_lower_bound,
)
from tests.published import (
    CASES,
    GOLDEN,
    assert_close,
    base_optimizer,
    logits_and_stats,
    smooth_cross_entropy,
    tree_of,
)

TWO_GRADIENT_CASES = [name for name in CASES if "adaptive" in CASES[name]["hyperparameters"]]
TWO_GRADIENT_CASES.append("asam_mlp")

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("float64")]


def perturbation_loss_of(hyperparameters: dict):
    """Returns Q per example for a case, or None if the training loss is ascended."""
    match hyperparameters.get("ascent_loss", "smooth_ce"):
        case "log":
            return functools.partial(perturbation_loss, mu=hyperparameters["mu"])
        case "tanh":
            bound = functools.partial(tanh_lower_bound, alpha=hyperparameters["alpha"])
            return functools.partial(perturbation_loss, lower_bound=bound, mu=hyperparameters["mu"])
    return None


def method_of(name: str, hyperparameters: dict) -> optax.GradientTransformationExtraArgs:
    rho = hyperparameters["rho"]
    if name == "asam_mlp":
        # The authors' code scales the arrays named "weight", which are W1 and W2.
        return asam(
            rho, hyperparameters["eta"], where=lambda p: jax.tree.map(lambda w: w.ndim > 1, p)
        )
    if hyperparameters["adaptive"]:
        return sharpness_aware(adaptive_l2_ball(rho, eta=0.0))
    return sam(rho) if hyperparameters["ascent_loss"] == "smooth_ce" else bisam(rho)


@pytest.mark.parametrize("name", TWO_GRADIENT_CASES)
def test_trajectory(name):
    golden, hyperparameters = np.load(GOLDEN / f"{name}.npz"), CASES[name]["hyperparameters"]
    sharpness = method_of(name, hyperparameters)
    base = base_optimizer(hyperparameters)
    q = perturbation_loss_of(hyperparameters)

    def loss(params, batch, per_example):
        logits, stats = logits_and_stats(params, batch[0])
        return per_example(logits, batch[1]).mean(), stats

    def descended(logits, labels):
        return smooth_cross_entropy(logits, labels, hyperparameters["label_smoothing"])

    @jax.jit
    def step(params, stats, state, base_state, batch):
        clean = jax.value_and_grad(loss, has_aux=True)
        (value, batch_stats), ascent = clean(params, batch, q or descended)
        grads, state = sharpness.update(
            None if q else ascent,
            state,
            params,
            loss_fn=lambda point: loss(point, batch, descended)[0],
            perturbation_grads=ascent if q else None,
        )
        updates, base_state = base.update(grads, base_state, params)
        stats = jax.tree.map(lambda r, b: 0.9 * r + 0.1 * b, stats, batch_stats)
        measured = {
            "ascent_grad": ascent,
            "perturbation_loss": value,
            "descent_grad": grads,
        }
        return optax.apply_updates(params, updates), stats, state, base_state, measured

    params, stats = tree_of(golden, "init"), tree_of(golden, "stats", 0)
    state, base_state = sharpness.init(params), base.init(params)
    for t in range(len(golden["batch/x"])):
        batch = jnp.asarray(golden["batch/x"][t]), jnp.asarray(golden["batch/y"][t])
        params, stats, state, base_state, measured = step(params, stats, state, base_state, batch)
        # The authors' losses leave out 1 / mu.
        mu = hyperparameters["mu"] if q else 1.0
        assert_close(measured["perturbation_loss"] * mu, golden["perturbation_loss"][t], "Q")
        for leaf in params:
            expected = golden[f"ascent_grad/{leaf}"][t]
            assert_close(measured["ascent_grad"][leaf] * mu, expected, f"ascent {leaf} {t}")
            expected = golden[f"descent_grad/{leaf}"][t]
            assert_close(measured["descent_grad"][leaf], expected, f"descent {leaf} {t}")
            assert_close(params[leaf], golden[f"traj/{leaf}"][t + 1], f"trajectory {leaf} {t}")
        for leaf in stats:
            assert_close(stats[leaf], golden[f"stats/{leaf}"][t + 1], f"statistics {leaf} {t}")


@pytest.mark.parametrize("name", TWO_GRADIENT_CASES)
def test_perturbation(name):
    golden, hyperparameters = np.load(GOLDEN / f"{name}.npz"), CASES[name]["hyperparameters"]
    sharpness = method_of(name, hyperparameters)

    @jax.jit
    def perturbed(params, ascent):
        points = []
        sharpness.update(
            None,
            sharpness.init(params),
            params,
            grad_fn=lambda point: (points.append(point), params)[1],
            perturbation_grads=ascent,
        )
        return points[0]

    for t in range(len(golden["batch/x"])):
        params = tree_of(golden, "traj", t)
        point = perturbed(params, tree_of(golden, "ascent_grad", t))
        for leaf in params:
            eps = point[leaf] - params[leaf]
            assert_close(eps, golden[f"eps/{leaf}"][t], f"eps {leaf} {t}")


@pytest.mark.parametrize("case", CASES["losses"]["hyperparameters"]["cases"])
def test_losses(case):
    golden, settings = (
        np.load(GOLDEN / "losses.npz"),
        CASES["losses"]["hyperparameters"]["cases"][case],
    )
    logits, labels = jnp.asarray(golden["logits"]), jnp.asarray(golden["labels"])
    if settings["loss"] == "smooth_crossentropy":
        loss_fn = functools.partial(smooth_cross_entropy, smoothing=settings["label_smoothing"])
        mu = 1.0
    else:
        ascent = settings["loss"].removeprefix("perturbation_loss_")
        loss_fn, mu = perturbation_loss_of({**settings, "ascent_loss": ascent}), settings["mu"]

    @jax.jit
    def values_and_grads(logits):
        values, pullback = jax.vjp(lambda logits: mu * loss_fn(logits, labels), logits)
        return values, pullback(jnp.ones_like(values))[0]

    values, grads = values_and_grads(logits)
    assert_close(values, golden[f"{case}/value"], "value")
    assert_close(grads, golden[f"{case}/grad"], "gradient")
