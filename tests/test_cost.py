"""Cost of a step, from the compiled program: FLOPs, temporary memory, state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    bilateral_sam,
    bisam,
    efficient_sam,
    friendly_sam,
    functional_sam,
    gsam,
    logits_loss,
    look_sam,
    perturbation_loss,
    sam,
    sampa,
    sparse_sam_dynamic,
    tilted_sam,
    value_and_grad,
    weighted_sam,
)

pytestmark = pytest.mark.optimized


def conv_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"conv1": (3, 3, 3, 16), "conv2": (3, 3, 16, 32), "head": (32, 10)}
    return {
        name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def logits_of(params, x):
    def conv(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dimensions)

    x = jax.nn.relu(conv(x, params["conv1"]))
    return jax.nn.relu(conv(x, params["conv2"])).mean((1, 2)) @ params["head"]


def mean_cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


loss_fn = logits_loss(lambda params, batch: logits_of(params, batch["x"]), mean_cross_entropy)


def perturbation_loss_fn(params, batch):
    return perturbation_loss(logits_of(params, batch["x"]), batch["y"]).mean()


PARAMS = conv_params()
BATCH = {
    "x": jax.ShapeDtypeStruct((32, 16, 16, 3), jnp.float32),
    "y": jax.ShapeDtypeStruct((32,), jnp.int32),
}


NO_STATE = optax.identity()


def compiled(step, tx=NO_STATE, params=PARAMS, batch=BATCH, **jit_options):
    """Compiles a program that is counted but never run, so its machine code need not be fast."""
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, **jit_options).lower(params, state, batch)
    return lowered.compile({"xla_backend_optimization_level": 0})


def plain(params, state, batch):
    return *jax.value_and_grad(loss_fn)(params, batch), state


@functools.cache
def flops_of_a_gradient():
    return flops(plain)


def flops(step, tx=NO_STATE):
    return compiled(step, tx).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("make", "q"), [(bisam, perturbation_loss_fn), (sam, None)], ids=["bisam", "sam"]
)
@pytest.mark.parametrize("rho", [0.1, lambda count: 0.1], ids=["constant", "schedule"])
def test_a_step_is_two_gradients(make, q, rho):
    tx = make(rho)
    ratio = flops(value_and_grad(tx, loss_fn, q), tx) / flops_of_a_gradient()
    assert ratio == pytest.approx(2.00, rel=0.01)


def test_an_unused_clean_gradient_costs_nothing_under_jit():
    tx = bisam(0.1)

    def step(params, state, batch):
        _, grads = jax.value_and_grad(loss_fn)(params, batch)
        return tx.update(
            grads,
            state,
            params,
            loss_fn=lambda p: loss_fn(p, batch),
            perturbation_loss_fn=lambda p: perturbation_loss_fn(p, batch),
        )

    assert flops(step, tx) / flops_of_a_gradient() == pytest.approx(2.00, rel=0.01)


@pytest.mark.slow
def test_groups_cost_two_gradients_too():
    tx = bisam(0.1)
    step = value_and_grad(tx, loss_fn, perturbation_loss_fn, group_size=8)
    assert flops(step, tx) / flops_of_a_gradient() == pytest.approx(2.00, rel=0.03)


FAMILY = {
    "gsam": (lambda: gsam(0.1), None, 2),
    # XLA shares the forward pass of the two clean gradients, a third of one.
    "gsam, bilevel": (lambda: gsam(0.1), perturbation_loss_fn, 3 - 1 / 3),
    "bilateral": (lambda: bilateral_sam(0.1, 0.1), None, 3),
    "bilateral, bilevel": (lambda: bilateral_sam(0.1, 0.1), perturbation_loss_fn, 4 - 1 / 3),
    "friendly": (lambda: friendly_sam(0.1), perturbation_loss_fn, 2),
    "sparse": (lambda: sparse_sam_dynamic(0.1), perturbation_loss_fn, 2),
    "weighted": (lambda: weighted_sam(0.1), None, 2),
    "weighted, bilevel": (lambda: weighted_sam(0.1), perturbation_loss_fn, 3 - 1 / 3),
    # Here, XLA also shares the forward pass at the parameters.
    "functional": (lambda: functional_sam(0.1), None, 2),
    "functional, bilevel": (lambda: functional_sam(0.1), perturbation_loss_fn, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "q"),
    [(bisam, perturbation_loss_fn), (sam, None), (gsam, None)],
    ids=["bisam", "sam", "gsam"],
)
@pytest.mark.parametrize(("step", "gradients"), [(2, 1.00), (3, 2.00)])
def test_when_costs_one_gradient_or_two(make, q, step, gradients):
    tx = make(0.1)
    due = value_and_grad(tx, loss_fn, q, when=lambda step: step >= 3)
    ratio = flops(functools.partial(due, step=step), tx) / flops_of_a_gradient()
    assert ratio == pytest.approx(gradients, rel=0.02)


def test_when_computes_one_branch_of_a_traced_step():
    evaluated = []

    def noted(w, batch):
        jax.debug.callback(lambda: evaluated.append(None))
        return jnp.sum(w**2)

    for tx, each in ((bisam(0.1), 2), (gsam(0.1), 3)):
        step = jax.jit(value_and_grad(tx, noted, noted, when=lambda step: step >= 2))
        for i in range(4):
            evaluated.clear()
            jax.block_until_ready(step(jnp.ones(2), tx.init(jnp.ones(2)), None, step=i))
            jax.effects_barrier()
            assert len(evaluated) == (each if i >= 2 else 1)


@pytest.mark.parametrize("q", [None, perturbation_loss_fn], ids=["sam", "bisam"])
def test_look_computes_the_second_gradient_every_kth_step(q):
    """In between, a perturbation loss has only its value computed, and no gradient."""
    tx, evaluated = look_sam(0.1, k=3), []

    def counted(fn):
        @jax.custom_vjp
        def noted(params, batch):
            return fn(params, batch)

        def forward(params, batch):
            return jax.vjp(fn, params, batch)

        def backward(pullback, cotangent):
            jax.debug.callback(lambda: evaluated.append(None))
            return pullback(cotangent)

        noted.defvjp(forward, backward)
        return noted

    def square(w, batch):
        return jnp.sum(w**2)

    step = jax.jit(value_and_grad(tx, counted(square), q and counted(square)))
    w = jnp.ones(2)
    state = tx.init(w)
    for i in range(4):
        evaluated.clear()
        _, grads, state = step(w, state, jnp.ones(2))
        jax.block_until_ready(grads)
        jax.effects_barrier()
        assert len(evaluated) == (2 + (q is not None) if i % 3 == 0 else 1)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "q", "gradients"), FAMILY.values(), ids=FAMILY)
def test_gradients_of_the_family(make, q, gradients):
    tx = make()
    ratio = flops(value_and_grad(tx, loss_fn, q), tx) / flops_of_a_gradient()
    # In such a small network, the operations per weight are visible.
    assert ratio == pytest.approx(gradients, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_tilted_is_two_gradients_a_sample(together):
    tx = tilted_sam(0.1, num_samples=2, together=together)

    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        return tx.update(grads, state, params, loss_fn=lambda p: loss_fn(p, batch))

    # Four gradients, and the drawing of the noise, which is visible in such a small network.
    assert flops(step, tx) / flops_of_a_gradient() == pytest.approx(4, rel=0.06)


@pytest.mark.slow
def test_tilted_needs_the_memory_of_one_sample():
    memory = {}
    for num_samples, together in ((1, False), (6, False), (6, True)):
        tx = tilted_sam(0.1, num_samples=num_samples, together=together)

        def step(params, state, batch, tx=tx):
            return tx.update(params, state, params, loss_fn=lambda p: loss_fn(p, batch))

        analysis = compiled(step, tx).memory_analysis()
        memory[num_samples, together] = analysis.temp_size_in_bytes
    assert memory[6, False] < 1.5 * memory[1, False]
    assert memory[6, True] > 3 * memory[1, False]


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_efficient_is_a_gradient_a_forward_pass_and_gamma_of_a_gradient(gamma):
    tx = efficient_sam(0.1, beta=0.5, gamma=gamma)

    def losses_of(params, indices, batch):
        part = batch if indices is None else jax.tree.map(lambda x: x[indices], batch)
        logits = logits_of(params, part["x"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, part["y"])

    def step(params, state, batch):
        def clean(params):
            losses = losses_of(params, None, batch)
            return losses.mean(), losses

        grads, losses = jax.grad(clean, has_aux=True)(params)
        return tx.update(
            grads,
            state,
            params,
            example_losses=losses,
            example_losses_fn=lambda p, indices: losses_of(p, indices, batch),
        )

    gradient = flops_of_a_gradient()
    forward = flops(lambda params, state, batch: loss_fn(params, batch))
    expected = gradient + (forward if gamma < 1 else 0) + gamma * gradient
    assert flops(step, tx) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_sampa_is_two_gradients():
    tx = sampa(optax.sgd(0.1, momentum=0.9), 0.1, batch_like=BATCH)
    calls = []

    def counted(params, batch):
        calls.append(batch["x"].shape)
        return loss_fn(params, batch)

    def step(params, state, batch):
        return tx.update(None, state, params, batch_loss_fn=counted, batch=batch)

    assert flops(step, tx) / flops_of_a_gradient() == pytest.approx(2, rel=0.02)
    assert calls == [BATCH["x"].shape] * 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [bisam, gsam])
def test_skipped_steps_compute_no_second_gradient(make):
    """SAM every other step, and late SAM: the perturbed pass is evaluated only when due."""
    params, grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    evaluated = []

    def noted(w):
        jax.debug.callback(lambda: evaluated.append(None))
        return jnp.sum(w**2)

    for due in (lambda step: step % 2 == 0, lambda step: step >= 2):
        tx = optax.conditionally_transform(make(0.1), due)
        update = jax.jit(
            lambda g, s, tx=tx: tx.update(g, s, params, loss_fn=noted, perturbation_loss_fn=noted)
        )
        state = tx.init(params)
        for step in range(4):
            evaluated.clear()
            out, state = update(grads, state)
            jax.effects_barrier()
            assert len(evaluated) == (2 if due(step) else 0)
            if not due(step):
                chex.assert_trees_all_equal(out, grads)


@pytest.mark.slow
def test_microbatches_save_memory():
    tx = bisam(0.1)
    whole, parts = (
        compiled(value_and_grad(tx, loss_fn, perturbation_loss_fn, microbatch_size=size), tx)
        .memory_analysis()
        .temp_size_in_bytes
        for size in (None, 4)
    )
    assert parts < whole / 3


def big_loss(params, batch):
    """Nearly all memory is parameters: one matrix, few examples."""
    return jnp.square(batch["x"] @ params["w"]).mean()


@pytest.mark.slow
def test_one_extra_copy_of_the_parameters_during_a_step():
    params = {"w": jax.ShapeDtypeStruct((2048, 2048), jnp.float32)}
    batch = {"x": jax.ShapeDtypeStruct((8, 2048), jnp.float32)}
    size = 4 * params["w"].size
    tx = optax.chain(sam(0.1), optax.sgd(0.1))

    def sharp(params, state, batch):
        _, updates, state = value_and_grad(tx, big_loss)(params, state, batch)
        return optax.apply_updates(params, updates), state

    def base(params, state, batch):
        grads = jax.grad(big_loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    temporary = [
        compiled(step, tx, params, batch, donate_argnums=0).memory_analysis().temp_size_in_bytes
        for step in (sharp, base)
    ]
    assert temporary[0] <= temporary[1] + 1.1 * size


def test_the_state_of_a_constant_radius_is_empty():
    assert jax.tree.leaves(bisam(0.1).init(PARAMS)) == []
    chex.assert_shape(jax.tree.leaves(bisam(lambda count: 0.1).init(PARAMS)), [()])
