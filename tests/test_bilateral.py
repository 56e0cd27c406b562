import numpy as np
import pytest

from bisam_jax import bilateral_sam
from tests.equivalences import assert_bilevel_through_value_and_grad, each_size
from tests.quadratic import W, descent, each_ascent, gradient, quadratic, unit

pytestmark = pytest.mark.usefixtures("float64")


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


BILATERAL = bilateral_sam(0.3, 0.1)


@each_size
def test_bilevel_through_value_and_grad(sizes):
    assert_bilevel_through_value_and_grad(BILATERAL, sizes)


def test_errors():
    with pytest.raises(ValueError, match="rho must be finite, >= 0"):
        bilateral_sam(rho_min=-1.0)
