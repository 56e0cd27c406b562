"""The family: closed forms on quadratics, limit cases, bilevel versions, bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    bilateral_sam,
    dynamic_mask,
    efficient_sam,
    fisher_mask,
    fisher_scores,
    friendly,
    friendly_sam,
    gsam,
    random_subset,
    sam,
    sampa,
    sparse_sam_dynamic,
    sparse_sam_fisher,
    tilted_sam,
    value_and_grad,
)
from bisam_jax.top_k import top_k_mask
from tests.problems import (
    loss_of_batch,
    mlp_batch,
    mlp_params,
    perturbation_loss_of_batch,
)

# L(w) = w A w / 2 - b w, with gradient A w - b; Q(w) = c w, with gradient c.
A = np.array([[3.0, 1.0], [1.0, 2.0]])
B = np.array([1.0, -1.0])
C = np.array([-5.0, 12.0])
W = np.array([0.5, 2.0])

pytestmark = pytest.mark.usefixtures("float64")


def quadratic(w):
    return 0.5 * w @ jnp.asarray(A) @ w - jnp.asarray(B) @ w


def linear(w):
    return jnp.asarray(C) @ w


def gradient(w):
    return A @ w - B


def unit(v):
    return v / np.linalg.norm(v)


def descent(tx, state=None, **extra_args):
    state = tx.init(W) if state is None else state
    arguments = {"loss_fn": quadratic} | extra_args
    return tx.update(jnp.asarray(gradient(W)), state, jnp.asarray(W), **arguments)


each_ascent = pytest.mark.parametrize(
    ("q", "a"), [({}, gradient(W)), ({"perturbation_loss_fn": linear}, C)], ids=["sam", "bisam"]
)


@each_ascent
def test_gsam_on_a_quadratic(q, a):
    p = gradient(W + 0.3 * unit(a))
    orthogonal = gradient(W) - (gradient(W) @ unit(p)) * unit(p)
    grads, _ = descent(gsam(0.3, alpha=0.7), **q)
    np.testing.assert_allclose(grads, p - 0.7 * orthogonal, rtol=1e-12)
    np.testing.assert_allclose(orthogonal @ p, 0, atol=1e-12)


@each_ascent
def test_bilateral_on_a_quadratic(q, a):
    up, down = gradient(W + 0.3 * unit(a)), gradient(W - 0.1 * unit(a))
    ratio = np.linalg.norm(up) / np.linalg.norm(down)
    grads, _ = descent(bilateral_sam(0.3, 0.1), **q)
    np.testing.assert_allclose(grads, up + gradient(W) - ratio * down, rtol=1e-12)


def test_bilateral_points_are_symmetric():
    points = []
    descent(bilateral_sam(0.3, 0.3), loss_fn=None, grad_fn=lambda w: (points.append(w), w)[1])
    np.testing.assert_allclose(points[0] + points[1], 2 * W, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(points[0] - W), 0.3, rtol=1e-12)
    assert quadratic(points[0]) > quadratic(W)


@pytest.mark.parametrize("tilt", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("together", [False, True])
@each_ascent
def test_tilted_on_a_quadratic(q, a, together, tilt):
    z = np.array([[0.3, -0.4], [3.0, 4.0], [0.0, 0.1]])
    losses, grads = [], []
    for noise in z:
        noise = 0.5 * noise * min(1, 1.0 / (0.5 * np.linalg.norm(noise)))
        ascent = C if q else gradient(W + noise)
        point = W + noise + 0.2 * unit(ascent)
        losses.append(float(quadratic(point)))
        grads.append(gradient(point))
    weights = np.exp(tilt * np.array(losses))
    expected = weights @ np.array(grads) / weights.sum()
    tx = tilted_sam(0.2, tilt, 3, radius=1.0, scale=0.5, together=together)
    np.testing.assert_allclose(descent(tx, noise=jnp.asarray(z), **q)[0], expected, rtol=1e-12)


def test_tilted_limits():
    plain, _ = descent(sam(0.2))
    one, _ = descent(tilted_sam(0.2, num_samples=1, radius=0.0))
    np.testing.assert_allclose(one, plain, rtol=1e-12)
    z = jnp.array([[0.3, -0.4], [0.3, 0.1]])
    alone = [descent(tilted_sam(0.2, 1.0, 1), noise=z[i : i + 1])[0] for i in (0, 1)]
    points = W + np.array(z)
    worst = int(np.argmax([quadratic(w + 0.2 * unit(gradient(w))) for w in points]))
    for together in (False, True):
        large, _ = descent(tilted_sam(0.2, 1e4, 2, together=together), noise=z)
        np.testing.assert_allclose(large, alone[worst], rtol=1e-9)


def test_tilted_draws_are_new_each_step_and_can_be_replayed():
    tx = tilted_sam(0.2, key=jax.random.key(5))
    state = tx.init(W)
    first, next_state = descent(tx, state)
    again, _ = descent(tx, state)
    second, _ = descent(tx, next_state)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


def test_tilted_noise_is_normal_and_no_longer_than_the_radius():
    # The gradient of |w|^2 / 2 is the point itself: with rho = 0, the noise.
    params = jnp.zeros(2000)
    short = tilted_sam(0.0, num_samples=1, radius=0.25, scale=0.5)
    grads, _ = short.update(params, short.init(params), params, loss_fn=lambda w: jnp.sum(w**2) / 2)
    np.testing.assert_allclose(np.linalg.norm(grads), 0.25, rtol=1e-9)
    long = tilted_sam(0.0, num_samples=1, radius=1e9, scale=0.5)
    grads, _ = long.update(params, long.init(params), params, loss_fn=lambda w: jnp.sum(w**2) / 2)
    assert np.std(grads) == pytest.approx(0.5, rel=0.05)
    assert abs(np.mean(grads)) < 0.05


@each_ascent
def test_friendly_on_a_quadratic(q, a):
    tx = friendly_sam(0.3, sigma=0.5, decay=0.8)
    grads, state = descent(tx, **q)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a)), rtol=1e-12)
    other = np.array([1.0, 7.0])
    mean = a
    grads, state = tx.update(jnp.asarray(other), state, jnp.asarray(W), loss_fn=quadratic)
    expected = gradient(W + 0.3 * unit(other - 0.5 * mean))
    np.testing.assert_allclose(grads, expected, rtol=1e-12)
    expected = 0.8 * a + 0.2 * other
    np.testing.assert_allclose(optax.tree.get(state, "mean_gradient"), expected, rtol=1e-12)


@each_ascent
def test_sparse_fisher_on_a_quadratic(q, a):
    tx = sparse_sam_fisher(0.3, sparsity=0.5, update_every=2)
    grads, state = descent(tx, fisher_scores_fn=lambda w: jnp.array([2.0, 1.0]), **q)
    eps = 0.3 * unit(a) * [1, 0]
    np.testing.assert_allclose(grads, gradient(W + eps), rtol=1e-12)
    other = {"fisher_scores_fn": lambda w: jnp.array([1.0, 2.0])}
    kept, state = descent(tx, state, **other, **q)
    np.testing.assert_allclose(kept, grads, rtol=1e-12)
    renewed, _ = descent(tx, state, **other, **q)
    np.testing.assert_allclose(renewed, gradient(W + 0.3 * unit(a) * [0, 1]), rtol=1e-12)


@each_ascent
def test_sparse_dynamic_on_a_quadratic(q, a):
    tx = sparse_sam_dynamic(0.3, sparsity=0.5, drop_rate=1.0, update_every=2)
    state = optax.tree.set(tx.init(W), dynamic_mask=jnp.array([True, False]))
    grads, state = descent(tx, state, **q)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a) * [1, 0]), rtol=1e-12)
    np.testing.assert_array_equal(optax.tree.get(state, "dynamic_mask"), [False, True])
    grads, state = descent(tx, state, **q)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a) * [0, 1]), rtol=1e-12)
    np.testing.assert_array_equal(optax.tree.get(state, "dynamic_mask"), [False, True])


def example_losses(w, indices):
    targets = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, -2.0], [0.5, 2.5]])
    chosen = targets if indices is None else targets[indices]
    return 0.5 * jnp.sum((w[None] - chosen) ** 2, axis=-1)


@each_ascent
def test_efficient_on_a_quadratic(q, a):
    subset, beta = jnp.array([True, False]), 0.25
    point = W + 0.3 * unit(a) * [1, 0] / beta
    rise = np.asarray(example_losses(jnp.asarray(point), None) - example_losses(W, None))
    worst = np.sort(np.argsort(-rise)[:2])
    targets = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, -2.0], [0.5, 2.5]])
    expected = point - targets[worst].mean(0)
    tx = efficient_sam(0.3, beta=beta, gamma=0.5)
    for losses in (None, example_losses(W, None)):
        grads, _ = descent(tx, subset=subset, example_losses_fn=example_losses, losses=losses, **q)
        np.testing.assert_allclose(grads, expected, rtol=1e-12)


@each_ascent
def test_efficient_with_everything_is_sam(q, a):
    tx = efficient_sam(0.3, beta=1.0, gamma=1.0)
    grads, _ = descent(tx, example_losses_fn=lambda w, indices: quadratic(w)[None], **q)
    np.testing.assert_allclose(grads, gradient(W + 0.3 * unit(a)), rtol=1e-12)


def test_random_subset_keeps_the_mean():
    tx = random_subset(0.25, key=3)
    eps = jnp.ones(10_000)
    kept, state = tx.update(eps, tx.init(eps))
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert np.mean(kept) == pytest.approx(1.0, rel=0.1)
    other, _ = tx.update(eps, state)
    assert (kept != other).any()


@pytest.mark.parametrize("bilevel", [False, True])
def test_sampa_on_a_quadratic(bilevel):
    shifts = np.array([[0.0, 0.0], [1.0, -1.0], [0.5, 2.0]])

    def batch_loss_fn(w, batch):
        return quadratic(w) + batch @ w

    def batch_q(w, batch):
        return linear(w) + batch[0] * jnp.sum(w**2)

    q = {"batch_perturbation_loss_fn": batch_q} if bilevel else {}
    rate, momentum, lam = 0.1, 0.9, 0.3
    tx = sampa(optax.sgd(rate, momentum=momentum), 0.2, lam, bilevel=bilevel)
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    x, v, look, direction = W, np.zeros(2), np.zeros(2), np.zeros(2)
    for t, batch in enumerate(shifts):
        previous = shifts[max(t - 1, 0)]
        updates, state = tx.update(
            None,
            state,
            w,
            batch_loss_fn=batch_loss_fn,
            batch=jnp.asarray(batch),
            previous_batch=jnp.asarray(previous if t else shifts[2]),
            **q,
        )
        w = w + updates
        eps = 0.2 * unit(direction) if t else 0.0
        p = gradient(x + eps) + previous
        y = x - rate * (look + momentum * v) if t else x
        look = gradient(y) + batch
        direction = C + 2 * batch[0] * y if bilevel else look
        v = momentum * v + (1 - lam) * p + lam * look
        x = x - rate * v
        np.testing.assert_allclose(w, x, rtol=1e-12)


def test_sampa_with_interpolation_one_is_the_lookahead_optimizer():
    base = optax.sgd(0.1)
    tx = sampa(base, 0.5, 1.0)
    w, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    x, look = W, np.zeros(2)
    for t in range(4):
        updates, state = tx.update(
            None, state, w, batch_loss_fn=lambda w, _: quadratic(w), batch=0.0, previous_batch=0.0
        )
        w = w + updates
        look = gradient(x - 0.1 * look) if t else gradient(x)
        x = x - 0.1 * look
        np.testing.assert_allclose(w, x, rtol=1e-12)


PARAMS, BATCH = mlp_params(), mlp_batch()


def batch_loss(params):
    return loss_of_batch(params, BATCH)


@pytest.mark.parametrize(
    "tx",
    [
        gsam(0.3, alpha=0.0),
        friendly_sam(0.3, sigma=0.0),
        sparse_sam_fisher(0.3, sparsity=0.0),
        sparse_sam_dynamic(0.3, sparsity=0.0),
        tilted_sam(0.3, num_samples=1, radius=0.0),
        tilted_sam(0.3, num_samples=3, scale=0.0, together=True),
    ],
    ids=["gsam", "friendly", "fisher", "dynamic", "tilted", "tilted together"],
)
def test_limits_that_are_sam(tx):
    state, plain = tx.init(PARAMS), sam(0.3)
    for scale in (1.0, 0.5):
        params = optax.tree.scale(scale, PARAMS)
        grads = jax.grad(batch_loss)(params)
        actual, state = tx.update(
            grads, state, params, loss_fn=batch_loss, fisher_scores_fn=lambda p: p
        )
        expected, _ = plain.update(grads, plain.init(params), params, loss_fn=batch_loss)
        chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [{}, {"microbatch_size": 4}, {"group_size": 16}])
@pytest.mark.parametrize(
    "tx",
    [gsam(0.3), bilateral_sam(0.3, 0.1), tilted_sam(0.3, 2.0), friendly_sam(0.3)],
    ids=["gsam", "bilateral", "tilted", "friendly"],
)
def test_bilevel_versions_through_value_and_grad(tx, sizes):
    step = value_and_grad(tx, loss_of_batch, perturbation_loss_of_batch, **sizes)
    value, grads, _ = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)

    def q(params):
        return perturbation_loss_of_batch(params, BATCH)

    expected, _ = tx.update(
        jax.grad(batch_loss)(PARAMS),
        tx.init(PARAMS),
        PARAMS,
        loss_fn=batch_loss,
        perturbation_loss_fn=q,
    )
    chex.assert_trees_all_close(grads, expected, rtol=5e-5, atol=1e-6)
    np.testing.assert_allclose(value, q(PARAMS), rtol=1e-5)


@pytest.mark.parametrize("q", [None, perturbation_loss_of_batch], ids=["sam", "bisam"])
def test_efficient_through_value_and_grad(q):
    def losses(params, indices):
        part = BATCH if indices is None else jax.tree.map(lambda x: x[indices], BATCH)
        return jax.vmap(
            lambda x, y: loss_of_batch(params, {"x": x[None], "y": y[None]}), in_axes=(0, 0)
        )(part["x"], part["y"])

    tx = efficient_sam(0.3, beta=1.0, gamma=1.0)
    step = value_and_grad(tx, loss_of_batch, q)
    _, grads, _ = step(PARAMS, tx.init(PARAMS), BATCH, example_losses_fn=losses)
    plain = value_and_grad(sam(0.3), loss_of_batch, q)
    _, expected, _ = plain(PARAMS, sam(0.3).init(PARAMS), BATCH)
    chex.assert_trees_all_close(grads, expected, rtol=5e-5, atol=1e-6)


def test_fisher_scores_are_sums_of_squared_gradients():
    expected = [
        jax.tree.map(
            jnp.square,
            jax.grad(loss_of_batch)(PARAMS, jax.tree.map(lambda x, i=i: x[i : i + 1], BATCH)),
        )
        for i in range(16)
    ]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *expected)
    for size in (1, 4):
        scores = fisher_scores(loss_of_batch, PARAMS, BATCH, microbatch_size=size)
        chex.assert_trees_all_close(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("k", [0, 1, 7, 50, 100])
def test_top_k_mask_is_exact_over_all_leaves(k, dtype):
    rng = np.random.default_rng(0)
    flat = rng.exponential(size=100).astype(dtype)
    flat[rng.integers(0, 100, 30)] = flat[3]  # ties
    scores = {"a": jnp.asarray(flat[:40].reshape(4, 10)), "b": (jnp.asarray(flat[40:]),)}
    mask = jax.jit(top_k_mask)(scores, k)
    got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mask)])
    order = np.lexsort((np.arange(100), -flat))
    expected = np.zeros(100, bool)
    expected[order[:k]] = True
    np.testing.assert_array_equal(got, expected)


def test_top_k_mask_of_zeros_and_of_nothing():
    assert top_k_mask(jnp.zeros(5), 2).tolist() == [True, True, False, False, False]
    assert top_k_mask({}, 0) == {}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_masked_share_is_exact(sparsity):
    n = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    tx = fisher_mask(sparsity)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    eps, _ = tx.update(ones, tx.init(PARAMS), PARAMS, fisher_scores_fn=lambda p: p)
    assert sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(eps)) == int(n * (1 - sparsity))
    tx = dynamic_mask(sparsity, drop_rate=0.3)
    state = tx.init(PARAMS)
    start = n - int(np.ceil(n * sparsity))
    for _ in range(3):
        eps, state = tx.update(ones, state, PARAMS)
        count = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(eps))
        assert start - 3 <= count <= start
    assert tx.init(PARAMS).dynamic_mask["head"]["w"].dtype == bool


def test_masks_over_sharded_parameters():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    scores = {"a": jax.random.uniform(jax.random.key(0), (64, 3)), "b": jnp.ones(8)}
    expected = top_k_mask(scores, 50)
    sharded = jax.jit(top_k_mask)(jax.device_put(scores, sharding), 50)
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(expected))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gsam(alpha=-1.0), ValueError, "alpha must be finite, >= 0"),
        (lambda: bilateral_sam(rho_min=-1.0), ValueError, "rho must be finite, >= 0"),
        (lambda: tilted_sam(num_samples=0), ValueError, "num_samples must be finite, >= 1, got 0"),
        (lambda: tilted_sam(num_samples=1.5), TypeError, "num_samples must be an integer"),
        (lambda: tilted_sam(radius=-1.0), ValueError, "radius must be finite, >= 0"),
        (lambda: descent(tilted_sam(), loss_fn=None), ValueError, "loss_fn is missing"),
        (
            lambda: descent(tilted_sam(), noise=jnp.ones((2, 2))),
            ValueError,
            r"noise, less its leading axis of num_samples, does not match .* \(2, 2\)",
        ),
        (lambda: friendly(decay=1.5), ValueError, "decay must be finite, >= 0, <= 1"),
        (lambda: friendly(sigma=-1.0), ValueError, "sigma must be finite, >= 0"),
        (
            lambda: sparse_sam_fisher(sparsity=1.5),
            ValueError,
            "sparsity must be finite, >= 0, <= 1",
        ),
        (lambda: sparse_sam_dynamic(sparsity=-1.0), ValueError, "sparsity must be finite"),
        (lambda: sparse_sam_dynamic(drop_rate=2.0), ValueError, "drop_rate must be finite"),
        (
            lambda: sparse_sam_fisher(update_every=0),
            ValueError,
            "update_every must be finite, >= 1",
        ),
        (lambda: descent(sparse_sam_fisher()), ValueError, "fisher_scores_fn is missing"),
        (
            lambda: descent(sparse_sam_fisher(), fisher_scores_fn=lambda w: w[:1]),
            ValueError,
            "what fisher_scores_fn returned does not match params",
        ),
        (
            lambda: descent(sparse_sam_dynamic(), drop_scores=jnp.ones(3)),
            ValueError,
            "drop_scores does not match params",
        ),
        (
            lambda: descent(
                sparse_sam_dynamic(),
                optax.tree.set(sparse_sam_dynamic().init(W), dynamic_mask=jnp.ones(3, bool)),
            ),
            ValueError,
            "the mask in the state does not match params",
        ),
        (lambda: efficient_sam(beta=0.0), ValueError, "beta must be finite, > 0, <= 1"),
        (lambda: efficient_sam(gamma=0.0), ValueError, "gamma must be finite, > 0, <= 1"),
        (lambda: efficient_sam(gamma=1.1), ValueError, "gamma must be finite"),
        (lambda: descent(efficient_sam()), ValueError, "example_losses_fn is missing"),
        (
            lambda: descent(efficient_sam(gamma=0.1), example_losses_fn=example_losses),
            ValueError,
            "gamma leaves no example to descend on, got gamma=0.1 for 4",
        ),
        (
            lambda: descent(efficient_sam(), example_losses_fn=lambda w, i: quadratic(w)),
            ValueError,
            "one loss an example",
        ),
        (
            lambda: descent(efficient_sam(), example_losses_fn=example_losses, subset=jnp.ones(3)),
            ValueError,
            "subset does not match params",
        ),
        (lambda: sampa(0.1), TypeError, "optimizer must be an optax transformation"),
        (lambda: sampa(optax.sgd(0.1), interpolation=2.0), ValueError, "interpolation must be"),
        (lambda: descent(sampa(optax.sgd(0.1))), ValueError, "batch_loss_fn is missing"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
