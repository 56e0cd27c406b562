import numpy as np
import pytest

from bisam_jax import weighted_sam
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
)

pytestmark = pytest.mark.usefixtures("float64")


@each_ball
@each_ascent
@each_grads
def test_weighted_on_a_quadratic(ball, eps, q, a, grads):
    perturbed = gradient(W + eps(a))
    for gamma, expected in (
        (0.0, GRADIENT),
        (0.5, perturbed),
        (0.75, GRADIENT + 3 * (perturbed - GRADIENT)),
    ):
        actual, _ = descent(weighted_sam(**ball, gamma=gamma), grads=grads, **q)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_with_equal_weights_it_is_sam():
    assert_is_sam(weighted_sam(0.3, gamma=0.5))


@pytest.mark.parametrize("gamma", [1.0, -0.1, 1.5, float("nan")])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match="gamma must be finite, >= 0, < 1"):
        weighted_sam(gamma=gamma)


def test_errors():
    assert_takes_one_ball(weighted_sam)
