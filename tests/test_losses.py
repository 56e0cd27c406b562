import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bisam_jax import log_lower_bound, margins, perturbation_loss, tanh_lower_bound

pytestmark = pytest.mark.optimized

BOUNDS = {
    "log": log_lower_bound,
    "tanh": tanh_lower_bound,
    "steep tanh": functools.partial(tanh_lower_bound, alpha=3.0),
}
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
LOSSES = {
    "log": perturbation_loss,
    "log, mu 10": functools.partial(perturbation_loss, mu=10.0),
    "tanh, mu 10": functools.partial(perturbation_loss, lower_bound=tanh_lower_bound, mu=10.0),
}

each_bound = pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def zero_one(x):
    return (x > 0).astype(np.float32)


@each_bound
@given(x=hnp.arrays(np.float32, 32, elements=st.floats(width=32, allow_nan=False)))
def test_bounds_are_below_the_zero_one_loss(bound, x):
    assert (np.asarray(bound(x)) <= zero_one(x)).all()


@each_bound
@pytest.mark.parametrize("center", [0.0, 1e-7, -1e-7, 1.0, 20.0, -20.0, 88.0, -88.0])
def test_bounds_are_below_the_zero_one_loss_at_every_neighbouring_float(bound, center):
    center = np.float32(center)
    step = max(np.spacing(np.abs(center)), np.float32(1e-10))
    x = center + step * np.arange(-100_000, 100_000, dtype=np.float32)
    assert (np.asarray(bound(x)) <= zero_one(x)).all()


@each_bound
def test_bounds_touch_the_zero_one_loss_and_increase(bound):
    x = np.linspace(-30, 30, 4001, dtype=np.float32)
    slope = np.asarray(jax.jit(jax.vmap(jax.grad(bound)))(x))
    assert bound(jnp.float32(0.0)) == 0
    assert bound(jnp.float32(1e4)) == 1
    assert (slope >= 0).all()
    assert (slope[np.abs(x) < 1] > 0).all()


@pytest.mark.usefixtures("float64")
def test_bounds_equal_their_formulas():
    x = np.linspace(-600, 600, 2001)
    gamma = np.log(np.e - 1)
    expected = 1 - np.logaddexp(0, gamma - x)
    np.testing.assert_allclose(log_lower_bound(x), expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(tanh_lower_bound(x, 0.3), np.tanh(0.3 * x), rtol=1e-13)


@pytest.mark.usefixtures("float64")
@each_bound
def test_bounds_have_exact_derivatives_of_two_orders(bound):
    x = np.array([-40.0, -3.0, -1e-3, 0.0, 1e-3, 3.0])
    h = 1e-5
    for order in (bound, jax.grad(bound)):
        derivative = jax.jit(jax.vmap(jax.grad(order)))(x)
        value = jax.jit(jax.vmap(order))
        central = (value(x + h) - value(x - h)) / (2 * h)
        np.testing.assert_allclose(derivative, central, atol=1e-8)


def test_margins():
    logits = jnp.array([[2.0, 1.0, 4.0], [0.0, -1.0, 1.0]])
    expected = [[0.0, -1.0, 2.0], [1.0, 0.0, 2.0]]
    np.testing.assert_array_equal(margins(logits, jnp.array([0, 1])), expected)
    np.testing.assert_array_equal(
        margins(logits.T, jnp.array([0, 1]), axis=0), np.transpose(expected)
    )
    np.testing.assert_array_equal(margins(logits[0], jnp.array(2)), [-2.0, -3.0, 0.0])


@pytest.mark.usefixtures("float64")
@each_bound
@pytest.mark.parametrize("mu", [0.1, 1, 1.0, 7.0])
def test_loss_equals_its_formula(bound, mu):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 4)) * 3, rng.integers(0, 4, (2, 5))
    difference = logits - np.take_along_axis(logits, labels[..., None], -1)
    expected = np.log(np.exp(mu * np.asarray(bound(difference))).sum(-1)) / mu
    actual = perturbation_loss(logits, labels, lower_bound=bound, mu=mu)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)
    moved = perturbation_loss(np.moveaxis(logits, -1, 0), labels, lower_bound=bound, mu=mu, axis=0)
    np.testing.assert_allclose(moved, expected, rtol=1e-13)


def test_default_case_equals_the_general_one():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(64, 10)) * np.logspace(-3, 3, 64)[:, None]).astype(np.float32)
    labels = rng.integers(0, 10, 64)

    def general(x):
        return perturbation_loss(x, labels, lower_bound=lambda x: log_lower_bound(x)).sum()

    def default(x):
        return perturbation_loss(x, labels).sum()

    value, grad = jax.jit(jax.value_and_grad(general))(logits)
    default_value, default_grad = jax.jit(jax.value_and_grad(default))(logits)
    np.testing.assert_allclose(default_value, value, rtol=1e-6)
    np.testing.assert_allclose(default_grad, grad, rtol=2e-5, atol=1e-30)


def test_any_lower_bound_and_traced_mu():
    logits, labels = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([0])

    def hinge(x):
        return jnp.minimum(x, 1.0)

    loss = jax.jit(lambda mu: perturbation_loss(logits, labels, lower_bound=hinge, mu=mu))
    np.testing.assert_allclose(loss(2.0), jnp.log(1 + 2 * jnp.exp(2.0)) / 2, rtol=1e-6)


# Keeps every rounding to a narrow dtype, as outside of jit.
@functools.partial(
    jax.jit, static_argnames="loss", compiler_options={"xla_allow_excess_precision": False}
)
def values_and_grads(loss, logits, labels, where):
    values, pullback = jax.vjp(lambda x: loss(x, labels, where=where), logits)
    return values, pullback(jnp.ones_like(values))[0]


@each_loss
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(data=st.data())
def test_finite_for_finite_logits(loss, dtype, data):
    shape = (4, 5)
    limit = float(ml_dtypes.finfo(dtype).max)
    wide = hnp.arrays(np.float64, shape, elements=st.floats(-limit, limit))
    logits = data.draw(
        wide | hnp.arrays(np.float64, shape, elements=st.sampled_from([-limit, 0.0, limit]))
    )
    logits = np.clip(logits, -limit, limit).astype(dtype)
    labels = data.draw(hnp.arrays(np.int32, 4, elements=st.integers(0, 4)))
    mask = data.draw(hnp.arrays(np.bool_, shape))
    for where in (None, mask):
        values, grads = map(np.asarray, values_and_grads(loss, logits, labels, where))
        assert values.dtype == np.float32
        assert grads.dtype == dtype
        assert np.isfinite(values).all()
        assert np.isfinite(grads.astype(np.float32)).all()


@each_loss
@given(
    logits=hnp.arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32)),
    order=st.permutations(range(5)),
)
def test_permuting_the_classes_changes_nothing(loss, logits, order):
    labels = jnp.array([0, 1, 2, 4])
    permuted = loss(logits[:, np.array(order)], jnp.argsort(jnp.array(order))[labels])
    np.testing.assert_allclose(permuted, loss(logits, labels), rtol=1e-5, atol=1e-6)


@each_loss
def test_gradient_sums_to_zero_even_for_confident_examples(loss):
    # In float32, a class 40 below the true one has a gradient of e^-40. It must also reach the true
    # logit, and not be lost next to larger terms.
    logits = jnp.array([[8.0, 0.0, -2.0], [7.0, 2.0, 0.0], [0.1, 0.0, 0.2]])
    if loss is perturbation_loss:
        logits = logits.at[0, 0].set(40.0)
    _, grads = values_and_grads(loss, logits, jnp.zeros(3, jnp.int32), None)
    np.testing.assert_allclose(grads[:, 0], -grads[:, 1:].sum(-1), rtol=1e-6, atol=0)
    assert (grads[:, 0] < 0).all()


def test_a_wrong_class_pushed_up_raises_the_loss():
    logits, labels = jnp.array([[1.0, 0.0]]), jnp.array([0])
    for loss in LOSSES.values():
        assert values_and_grads(loss, logits, labels, None)[1][0, 1] > 0


@each_loss
def test_where_equals_leaving_classes_out(loss):
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2])
    kept, _ = values_and_grads(loss, logits[:, :3], labels, None)
    mask = np.broadcast_to(np.arange(5) < 3, logits.shape)
    values, grads = values_and_grads(loss, np.where(mask, logits, -np.inf), labels, mask)
    # Near zero, the value is the logarithm of a sum near one, which is rounded differently.
    np.testing.assert_allclose(values, kept, rtol=1e-6, atol=np.finfo(np.float32).eps)
    assert jnp.isfinite(grads).all()
    assert (grads[:, 3:] == 0).all()


def test_where_of_examples_as_in_optax():
    logits, labels = jnp.array([[1.0, 3.0], [2.0, 0.0]]), jnp.array([0, 0])
    where = jnp.array([False, True])
    loss, grads = values_and_grads(perturbation_loss, logits, labels, where)
    ce = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels, where=where)
    assert loss[0] == ce[0] == 0
    np.testing.assert_allclose(loss[1], perturbation_loss(logits, labels)[1], rtol=1e-6)
    assert (grads[0] == 0).all()


def test_labels_of_a_narrow_type_reach_every_class():
    logits = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    labels = np.array([0, 255])
    for loss in LOSSES.values():
        narrow = loss(logits, labels.astype(np.uint8))
        np.testing.assert_array_equal(narrow, loss(logits, labels))


LOGITS, LABELS = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
OUT_OF_RANGE = {
    "the number of classes": [0, 3, 1, 2],
    "negative": [0, -1, 1, 2],
    "padding": [0, -100, 1, 2],
}
each_out_of_range = pytest.mark.parametrize("labels", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
each_array = pytest.mark.parametrize("array", [np.array, jnp.array], ids=["numpy", "jax"])
each_jit = pytest.mark.parametrize("jit", [lambda fn: fn, jax.jit], ids=["eager", "jit"])


@each_out_of_range
@each_array
@each_jit
@pytest.mark.parametrize("loss", [margins, perturbation_loss])
def test_concrete_labels_out_of_range(loss, jit, array, labels):
    known = array(labels)
    message = rf"labels must be in \[0, 3\), .* got {labels[1]};.*where=labels != -100"
    with pytest.raises(ValueError, match=message):
        jit(lambda logits: loss(logits, known))(LOGITS)


@each_array
@each_jit
def test_one_label_out_of_range(jit, array):
    known = array(3)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        jit(lambda logits: perturbation_loss(logits, known))(LOGITS[0])


@each_array
@each_jit
def test_no_labels(jit, array):
    known = array([]).astype(int)
    assert jit(lambda logits: perturbation_loss(logits, known))(LOGITS[:0]).shape == (0,)


@each_array
@each_jit
@pytest.mark.parametrize("of_classes", [False, True], ids=["of examples", "of classes"])
def test_masked_labels_may_be_out_of_range(jit, array, of_classes):
    labels = OUT_OF_RANGE["padding"]
    logits = jnp.arange(12, dtype=jnp.float32).reshape(4, 3)
    kept = np.array([True, False, True, True])
    where, known = array(kept[:, None].repeat(3, 1) if of_classes else kept), array(labels)
    value, pullback = jax.vjp(
        jit(lambda logits: perturbation_loss(logits, known, where=where)), logits
    )
    (grads,) = pullback(jnp.ones_like(value))
    expected = perturbation_loss(logits[kept], np.array(labels)[kept])
    np.testing.assert_allclose(value[kept], expected, rtol=1e-6)
    assert value[1] == 0
    assert (grads[1] == 0).all()
    assert jnp.isfinite(grads).all()


@each_out_of_range
@each_loss
def test_traced_labels(loss, labels):
    """A masked label out of range changes no value and no gradient."""
    logits, labels = np.arange(12, dtype=np.float32).reshape(4, 3), jnp.array(labels)
    where = jnp.array([True, False, True, True])
    values, grads = map(np.asarray, values_and_grads(loss, logits, labels, where))
    inside = jnp.where(where, labels, 0)
    expected = values_and_grads(loss, logits, inside, where)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(grads, expected[1])
    assert np.isfinite(values).all()
    assert np.isfinite(grads).all()
    assert (grads[1] == 0).all()


@pytest.mark.parametrize("label", [3, 100, -1, -3, -4, -100])
def test_a_traced_label_that_is_no_class_gives_nan(label):
    values, _ = values_and_grads(perturbation_loss, LOGITS, jnp.array([0, label, 1, 2]), None)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, False])


@each_array
@each_jit
def test_labels_of_examples_that_stay_are_checked(jit, array):
    labels, where = array([5, -100, 0, 0]), array([True, False, True, True])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), .* got 5"):
        jit(lambda logits: perturbation_loss(logits, labels, where=where))(LOGITS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: perturbation_loss(LOGITS, LABELS[:1]), ValueError, r"labels must have the shape"),
        (
            lambda: perturbation_loss(LOGITS, LABELS[:, None]),
            ValueError,
            r"labels must have the shape",
        ),
        (
            lambda: perturbation_loss(LOGITS, jnp.zeros(4)),
            TypeError,
            r"labels must be integers .* classification only\..* pass labels.argmax\(-1\)",
        ),
        (
            lambda: margins(LOGITS, np.zeros(4, np.float32)),
            TypeError,
            r"labels must be integers .* classification only",
        ),
        (
            lambda: perturbation_loss(LOGITS, LABELS, lower_bound=1.0),
            TypeError,
            r"lower_bound must be a function of margins, .* got 1.0",
        ),
        (
            lambda: perturbation_loss(LOGITS, LABELS, lower_bound=None),
            TypeError,
            r"lower_bound must be a function of margins",
        ),
        (lambda: perturbation_loss(LOGITS, LABELS, axis=2), ValueError, r"axis 2 is out of bounds"),
        (
            lambda: perturbation_loss(LOGITS.astype(int), LABELS),
            TypeError,
            r"logits must be floating",
        ),
        (lambda: perturbation_loss(LOGITS, LABELS, mu=0.0), ValueError, r"mu must be finite, > 0"),
        (lambda: perturbation_loss(LOGITS, LABELS, axis=None), TypeError, "axis must be an int"),
        (lambda: perturbation_loss(LOGITS, LABELS, mu=1e-46), ValueError, "mu must be finite, > 0"),
        (lambda: perturbation_loss(LOGITS, LABELS, mu=-1), ValueError, r"mu must be finite, > 0"),
        (lambda: perturbation_loss(LOGITS, LABELS, mu=np.nan), ValueError, r"mu must be finite"),
        (lambda: perturbation_loss(LOGITS, LABELS, mu="1"), TypeError, r"mu must be a real number"),
        (
            lambda: perturbation_loss(LOGITS, LABELS, where=LOGITS),
            TypeError,
            r"where must be boolean",
        ),
        (
            lambda: perturbation_loss(LOGITS, LABELS, where=jnp.ones((3, 3), bool)),
            ValueError,
            r"where must have the shape of logits, \(4, 3\)",
        ),
        (lambda: tanh_lower_bound(LOGITS, alpha=0), ValueError, r"alpha must be finite, > 0"),
        (lambda: tanh_lower_bound(LABELS), TypeError, r"margins must be floating"),
        (lambda: margins(LOGITS, LABELS[:2]), ValueError, r"labels must have the shape"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
