import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import sampa
from tests.quadratic import C, W, descent, gradient, linear, quadratic, unit

pytestmark = pytest.mark.usefixtures("float64")


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampa(0.1), TypeError, "optimizer must be an optax transformation"),
        (lambda: sampa(optax.sgd(0.1), interpolation=2.0), ValueError, "interpolation must be"),
        (lambda: descent(sampa(optax.sgd(0.1))), ValueError, "batch_loss_fn is missing"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
