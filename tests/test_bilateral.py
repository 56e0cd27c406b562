import jax.numpy as jnp
import numpy as np
import pytest

from bisam_jax import adaptive_l2_ball, bilateral_sam
from tests.quadratic import (
    GRADIENT,
    W,
    adaptive_eps,
    assert_takes_one_ball,
    descent,
    each_ascent,
    each_grads,
    gradient,
    unit,
)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("tx", "uphill", "downhill"),
    [
        (bilateral_sam(0.3, 0.1), lambda a: 0.3 * unit(a), lambda a: 0.1 * unit(a)),
        (
            bilateral_sam(perturbation=adaptive_l2_ball(0.3, eta=0.1)),
            adaptive_eps,
            adaptive_eps,
        ),
    ],
    ids=["balls", "adaptive balls"],
)
@each_ascent
@each_grads
def test_bilateral_on_a_quadratic(tx, uphill, downhill, q, a, grads):
    up, down = gradient(W + uphill(a)), gradient(W - downhill(a))
    ratio = np.linalg.norm(up) / np.linalg.norm(down)
    actual, _ = descent(tx, grads=grads, **q)
    np.testing.assert_allclose(actual, up + GRADIENT - ratio * down, rtol=1e-12)


def test_schedules_of_both_radii():
    tx = bilateral_sam(
        lambda count: jnp.where(count < 1, 0.3, 0.2), lambda count: jnp.where(count < 1, 0.1, 0.4)
    )
    state = tx.init(W)
    for rho_max, rho_min in ((0.3, 0.1), (0.2, 0.4)):
        actual, state = descent(tx, state)
        up = gradient(W + rho_max * unit(GRADIENT))
        down = gradient(W - rho_min * unit(GRADIENT))
        ratio = np.linalg.norm(up) / np.linalg.norm(down)
        np.testing.assert_allclose(actual, up + GRADIENT - ratio * down, rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="rho_min must be finite, >= 0"):
        bilateral_sam(rho_min=-1.0)
    for radius in ("rho_max", "rho_min"):
        assert_takes_one_ball(bilateral_sam, **{radius: 0.3})
