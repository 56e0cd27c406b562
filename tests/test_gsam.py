import numpy as np
import pytest

from bisam_jax import gsam
from tests.equivalences import assert_bilevel_through_value_and_grad, assert_is_sam, each_size
from tests.quadratic import W, descent, each_ascent, gradient, unit

pytestmark = pytest.mark.usefixtures("float64")


@each_ascent
def test_gsam_on_a_quadratic(q, a):
    p = gradient(W + 0.3 * unit(a))
    orthogonal = gradient(W) - (gradient(W) @ unit(p)) * unit(p)
    grads, _ = descent(gsam(0.3, alpha=0.7), **q)
    np.testing.assert_allclose(grads, p - 0.7 * orthogonal, rtol=1e-12)
    np.testing.assert_allclose(orthogonal @ p, 0, atol=1e-12)


def test_without_the_orthogonal_part_it_is_sam():
    assert_is_sam(gsam(0.3, alpha=0.0))


GSAM = gsam(0.3)


@each_size
def test_bilevel_through_value_and_grad(sizes):
    assert_bilevel_through_value_and_grad(GSAM, sizes)


def test_errors():
    with pytest.raises(ValueError, match="alpha must be finite, >= 0"):
        gsam(alpha=-1.0)
