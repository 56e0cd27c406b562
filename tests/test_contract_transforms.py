"""`update` of every method inside transformations of optax and JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods import METHODS
from tests.problems import mlp_params
from tests.test_contract import (
    GRADS,
    PARAMS,
    first_grads,
    gradient,
    loss_fn,
    sharp,
    update,
)

pytestmark = pytest.mark.slow

# With and without a clean gradient, single examples, a loop over samples, a key and a decision in
# the state, and derivatives of the network by themselves.
KINDS = ("bisam", "gsam", "sparse dynamic", "tilted", "efficient", "look", "functional")
DIFFERENTIATED = ("bisam", "bilateral", "sparse dynamic", "look")
each_kind = pytest.mark.parametrize(
    "method", [METHODS[name] for name in KINDS], ids=KINDS, scope="module"
)


@each_kind
def test_under_conditionally_transform_a_skipped_step_passes_on_the_gradient_of_l(method):
    tx = optax.conditionally_transform(method.make(rho=0.5), lambda step: step % 2 == 0)

    @jax.jit
    def step(state, grads):
        return update(method, tx, state, PARAMS, grads, q="function")

    state = tx.init(PARAMS)
    sharp_grads, state = step(state, GRADS)
    chex.assert_trees_all_close(sharp_grads, sharp(method, 0.5, q="function"), rtol=1e-4, atol=1e-5)
    skipped, after = step(state, GRADS)
    chex.assert_trees_all_equal(skipped, GRADS)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    with pytest.raises(TypeError, match="cond branch outputs"):
        step(state, None)


@each_kind
@pytest.mark.usefixtures("standard_promotion")
def test_the_same_everywhere(method):
    """Only unknown extra args, a chain, grad_fn, and a mask after the method change nothing.

    All are in one program, which compiles equal parts once.
    """
    tx = method.make(rho=0.1)
    chain = optax.chain(tx, optax.scale(2.0), optax.contrib.reduce_on_plateau(patience=2))
    mask = {"hidden": True, "head": False}
    masked = optax.chain(tx, optax.masked(optax.set_to_zero(), mask))

    @jax.jit
    def everywhere(params, grads):
        call = functools.partial(update, method, chain)
        chained, state = call(chain.init(params), params, grads, unknown=1, value=2.0)
        _, state = call(state, params, grads, unknown=1, value=3.0)
        equal = {
            "alone": first_grads(method, tx, params, grads),
            "with unknown": first_grads(method, tx, params, grads, unknown=1, value=2.0),
            "halved": optax.tree.scale(0.5, chained),
        }
        if method.takes_grad_fn:
            by_grad_fn = {"loss_fn": None, "grad_fn": jax.grad(loss_fn)}
            equal["by grad_fn"] = first_grads(method, tx, params, grads, **by_grad_fn)
        after = first_grads(method, masked, params, grads)
        return equal, after, optax.tree.get(state, "plateau_count")

    expected = sharp(method, 0.1)
    equal, after, plateau_count = everywhere(PARAMS, GRADS)
    for grads in equal.values():
        chex.assert_trees_all_close(grads, equal["alone"], rtol=1e-6)
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-7)
    assert plateau_count == 1
    assert optax.tree.norm(after["hidden"]) == 0
    chex.assert_trees_all_close(after["head"], equal["alone"]["head"])


def training(method):
    """Returns a training step, with a scheduled radius and a base optimizer with momentum."""
    tx = optax.chain(method.make(rho=lambda count: 0.1), optax.sgd(0.1, momentum=0.9))

    def step(carry, _=None):
        params, state = carry
        updates, state = update(method, tx, state, params, jax.grad(loss_fn)(params))
        return (optax.apply_updates(params, updates), state), None

    return step, tx.init


@functools.cache
def donating_step(method):
    step, init = training(method)
    return jax.jit(lambda carry: step(carry)[0], donate_argnums=0), init


def fresh_carry(init):
    params = jax.tree.map(jnp.copy, PARAMS)
    return params, init(params)


@each_kind
def test_scan_and_donated_steps_agree(method):
    step, init = training(method)
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4))((PARAMS, init(PARAMS)))
    step, init = donating_step(method)
    looped = fresh_carry(init)
    for _ in range(4):
        before = looped
        looped = step(looped)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    chex.assert_trees_all_close(scanned[0], looped[0], rtol=1e-4, atol=1e-5)


@each_kind
def test_vmap_over_rho_and_seeds(method):
    @jax.jit
    @jax.vmap
    def together(rho, params, grads):
        return first_grads(method, method.make(rho=lambda count: rho), params, grads)

    rhos, noise = np.array([0.0, 0.1, 0.5], np.float32), [mlp_params(10 + i) for i in range(3)]
    seeds = [jax.tree.map(lambda p, n: p + 0.1 * n, PARAMS, own) for own in noise]
    grads = [gradient(params) for params in seeds]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *zip(seeds, grads, strict=True))
    results = together(rhos, *stacked)
    for i, rho in enumerate(rhos):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], results)
        alone = sharp(method, float(rho), seeds[i], grads[i])
        chex.assert_trees_all_close(one, alone, rtol=1e-5, atol=1e-6)
    # Also as a plain scalar, not only from a schedule.
    jax.eval_shape(
        jax.vmap(lambda rho: first_grads(method, method.make(rho=rho), PARAMS, GRADS)), rhos
    )


@pytest.mark.parametrize("method", [METHODS[name] for name in DIFFERENTIATED], ids=DIFFERENTIATED)
@pytest.mark.usefixtures("float64")
def test_grad_through_the_step_and_remat(method):
    tx, params = method.make(rho=0.1), mlp_params(dtype=jnp.float64)
    direction = jax.tree.map(lambda p: np.cos(np.arange(p.size)).reshape(p.shape), params)

    def loss_after_a_step(t, fn):
        point = jax.tree.map(lambda p, d: p + t * d, params, direction)
        more = {"loss_fn": fn, "fisher_scores_fn": lambda p: p}
        grads = first_grads(method, tx, point, jax.grad(fn)(point), **more)
        return fn(jax.tree.map(lambda p, g: p - 0.1 * g, point, grads))

    @jax.jit
    def value_and_slopes(t):
        remat = jax.grad(loss_after_a_step)(t, jax.checkpoint(loss_fn))
        return *jax.value_and_grad(loss_after_a_step)(t, loss_fn), remat

    _, slope, remat = value_and_slopes(0.0)
    ahead, behind = (value_and_slopes(t)[0] for t in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)
    np.testing.assert_allclose(remat, slope, rtol=1e-12)
