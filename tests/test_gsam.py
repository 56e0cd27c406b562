import numpy as np
import pytest

from bisam_jax import gsam
from tests.equivalences import assert_is_sam
from tests.quadratic import (
    GRADIENT,
    W,
    assert_takes_one_ball,
    descent,
    each_ascent,
    each_ball,
    each_grads,
    gradient,
    unit,
)

pytestmark = pytest.mark.usefixtures("float64")


@each_ball
@each_ascent
@each_grads
def test_gsam_on_a_quadratic(ball, eps, q, a, grads):
    p = gradient(W + eps(a))
    orthogonal = GRADIENT - (GRADIENT @ unit(p)) * unit(p)
    actual, _ = descent(gsam(**ball, alpha=0.7), grads=grads, **q)
    np.testing.assert_allclose(actual, p - 0.7 * orthogonal, rtol=1e-12)
    np.testing.assert_allclose(orthogonal @ p, 0, atol=1e-12)


def test_without_the_orthogonal_part_it_is_sam():
    assert_is_sam(gsam(0.3, alpha=0.0))


def test_errors():
    with pytest.raises(ValueError, match="alpha must be finite, >= 0"):
        gsam(alpha=-1.0)
    assert_takes_one_ball(gsam)
