"""One step and one epoch, on fake data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import methods, models, training

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = training.Batch(
    images=jax.random.uniform(jax.random.key(0), (40, 8, 8, 1)),
    labels=jnp.arange(40, dtype=jnp.int32) % 10,
    positions=jnp.arange(40),
)
KEY = jax.random.key(5)
LOSS = training.cross_entropy(0.1)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def made(name, perturbation="ce", optimizer=OPTIMIZER):
    spec = methods.METHODS[name]
    perturbation = spec.ascends or perturbation
    hyperparameters = spec.defaults | methods.PERTURBATIONS[perturbation]
    return methods.make(name, perturbation, optimizer, hyperparameters, batch_like=BATCH)


def setup(name, perturbation="ce", model="mlp", **options):
    apply, params, stats = models.create(model, (8, 8, 1), 10, seed=0)
    method = made(name, perturbation)
    state = training.init_state(params, stats, method, KEY)
    return apply, training.make_step(apply, method, LOSS, **options), state


@pytest.mark.parametrize(
    ("name", "perturbation", "model"),
    [(name, perturbation, "mlp") for name in methods.METHODS for perturbation in ("ce", "log")]
    + [(name, "ce", "cnn") for name in ("sgd", "bisam-log", "bisam-tanh")],
)
def test_a_step_lowers_the_loss_and_moves_the_statistics_once(name, perturbation, model):
    apply, step, state = setup(name, perturbation, model)
    _, clean_stats = apply(state.params, state.stats, BATCH.images, train=True)
    new, loss = jax.jit(step)(state, BATCH)
    chex.assert_trees_all_close(new.stats, clean_stats, rtol=1e-4, atol=1e-6)
    logits, _ = apply(state.params, state.stats, BATCH.images, train=True)
    np.testing.assert_allclose(loss, LOSS(logits, BATCH.labels).mean(), rtol=1e-5)
    assert new.step == 1
    for _ in range(5):
        new, later = jax.jit(step)(new, BATCH)
    assert later < loss


def test_methods_differ():
    params = {}
    for name in methods.METHODS:
        for perturbation in ("ce", "log"):
            _, step, state = setup(name, perturbation)
            for _ in range(2):
                state, _ = jax.jit(step)(state, BATCH)
            params[name, perturbation] = state.params
    same = {("sam", "log"): ("bisam-log", "ce"), ("bisam-log", "log"): ("bisam-log", "ce")}
    same |= {("sgd", "log"): ("sgd", "ce"), ("bisam-tanh", "log"): ("bisam-tanh", "ce")}
    for key, value in params.items():
        for other_key, other in params.items():
            difference = optax.tree.norm(optax.tree.sub(value, other))
            if same.get(key, key) == same.get(other_key, other_key):
                assert difference < 1e-6
            else:
                assert difference > 1e-5, (key, other_key)


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of sgd, sam, asam"):
        methods.make("adam", "ce", OPTIMIZER, {})
    with pytest.raises(ValueError, match="perturbation must be one of ce, log, tanh"):
        methods.make("sam", "hinge", OPTIMIZER, {})


def test_plain_training_takes_one_gradient():
    flops = {}
    for name in ("sgd", "bisam-log"):
        _, step, state = setup(name)
        flops[name] = jax.jit(step).lower(state, BATCH).compile().cost_analysis()["flops"]
    assert 1.8 < flops["bisam-log"] / flops["sgd"] < 2.05


@pytest.mark.parametrize("perturbation", ["ce", "log"])
@pytest.mark.parametrize(
    "name", ["sgd", "bisam-log", "gsam", "friendly", "efficient", "sparse-fisher", "sampa"]
)
def test_microbatches_give_the_step_of_the_whole_batch(name, perturbation):
    apply, params, _ = models.create("vit_tiny", (8, 8, 1), 10, seed=0, depth=1)
    method = made(name, perturbation)
    first = training.init_state(params, {}, method, KEY)
    results = []
    for size in (None, 10):
        step = jax.jit(training.make_step(apply, method, LOSS, microbatch_size=size))
        state, losses = first, []
        # The first step of sampa is another.
        for _ in range(2):
            state, loss = step(state, BATCH)
            losses.append(loss)
        results.append((state.params, losses))
    whole, accumulated = results
    chex.assert_trees_all_close(accumulated[0], whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(accumulated[1], whole[1], rtol=1e-5)


def test_groups_are_perturbed_on_their_own():
    """The mean of steps on each group alone, as the definition says."""
    apply, params, stats = models.create("mlp", (8, 8, 1), 10, seed=0, width=16)
    method = made("bisam-log", optimizer=optax.sgd(1.0))
    state = training.init_state(params, stats, method, KEY)
    alone = jax.jit(training.make_step(apply, method, LOSS))
    groups = [jax.tree.map(lambda x, i=i: x[i : i + 20], BATCH) for i in (0, 20)]
    expected = [alone(state, group) for group in groups]
    step = training.make_step(apply, method, LOSS, group_size=20)
    grouped, loss = jax.jit(step)(state, BATCH)
    for tree in ("params", "stats"):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *(getattr(e[0], tree) for e in expected))
        chex.assert_trees_all_close(getattr(grouped, tree), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, (expected[0][1] + expected[1][1]) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [n for n, spec in methods.METHODS.items() if not (spec.is_plain or spec.contains_optimizer)],
)
def test_groups_of_every_method(name):
    _, step, state = setup(name, group_size=20)
    step = jax.jit(step)
    _, loss = step(state, BATCH)
    for _ in range(5):
        state, later = step(state, BATCH)
    assert later < loss


def without_keys(state):
    def data(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(data, state)


@pytest.mark.parametrize("name", ["sam", "bisam-log", "gsam", "look", "efficient"])
def test_before_the_start_and_between_the_steps_is_plain_training(name):
    when = training.whenever(2, 3)
    _, plain, state = setup("sgd")
    _, always, _ = setup(name)
    _, some, sometimes = setup(name, when=when)
    plain, always, some = map(jax.jit, (plain, always, some))
    for number in range(6):
        before = sometimes
        sometimes, loss = some(before, BATCH)
        if number in (2, 5):
            expected, same_loss = always(before, BATCH)
        else:
            as_plain = before._replace(method=state.method)
            expected, same_loss = plain(as_plain, BATCH)
            expected = expected._replace(method=before.method)
        chex.assert_trees_all_close(without_keys(sometimes), without_keys(expected), atol=1e-6)
        np.testing.assert_allclose(loss, same_loss, rtol=1e-6)
        if number == 2:
            moved = optax.tree.sub(sometimes.params, plain(as_plain, BATCH)[0].params)
            assert optax.tree.norm(moved) > 1e-4
    assert training.whenever(0, 1) is None


def test_a_single_example_takes_the_running_statistics():
    apply, _, state = setup("sparse-fisher")
    seen = []

    def spy(params, stats, images, *, train, keys=None):
        seen.append((len(images), train, keys is None))
        return apply(params, stats, images, train=train, keys=keys)

    jax.eval_shape(training.make_step(spy, made("sparse-fisher"), LOSS), state, BATCH)
    assert set(seen) == {(40, True, False), (1, False, True)}


@pytest.mark.parametrize("name", ["bisam-log", "gsam", "efficient", "friendly"])
def test_dropout_has_a_key_for_each_example_the_same_in_all_passes_of_a_step(name):
    seen = []
    apply, params, stats = models.create("mlp", (8, 8, 1), 10, seed=0, width=16)

    def spy(params, stats, images, *, train, keys=None):
        # Which images these are: their first pixels are all different.
        seen.append(dict(zip(np.asarray(images)[:, 0, 0, 0], map(str, keys), strict=True)))
        return apply(params, stats, images, train=train)

    method = made(name, "log")
    state = training.init_state(params, stats, method, KEY)
    step = training.make_step(spy, method, LOSS)
    with jax.disable_jit():
        state, _ = step(state, BATCH)
        first, *others = list(seen)
        step(state, BATCH)
    assert len(set(first.values())) == 40
    assert others
    for keys in others:
        assert keys.items() <= first.items()
    assert not set(seen[-1].values()) & set(first.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_over_the_other_classes(smoothing):
    logits = jnp.array([[1.0, 2.0, 4.0]])
    log_p = np.asarray(jax.nn.log_softmax(logits))[0]
    expected = -(1 - smoothing) * log_p[1] - smoothing / 2 * (log_p[0] + log_p[2])
    loss = training.cross_entropy(smoothing)(logits, jnp.array([1]))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
