"""One training step, on made-up data."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import models
from experiments.config.methods import METHODS, PERTURBATIONS
from experiments.step import train_step
from experiments.step.method import build_method

BATCH = train_step.Batch(
    images=jax.random.uniform(jax.random.key(0), (40, 8, 8, 1)),
    labels=jnp.arange(40, dtype=jnp.int32) % 10,
    positions=jnp.arange(40),
)
KEY = jax.random.key(5)
LOSS = train_step.cross_entropy(0.1)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
STEPS = 6
# Those that no name of a method stands for.
# One of each kind: plain, BiSAM, single examples, fewer examples, with its own optimizer.
IN_DEFAULT = ("sgd", "bisam-log", "sparse-fisher", "efficient", "sampa")


def made(name, perturbation="ce", optimizer=OPTIMIZER):
    spec = METHODS[name]
    perturbation = spec.ascends or perturbation
    hyperparameters = spec.defaults | PERTURBATIONS[perturbation]
    return build_method(name, perturbation, optimizer, hyperparameters, batch_like=BATCH)


@functools.cache
def small(model):
    sizes = {"mlp": {"width": 32, "depth": 1}, "cnn": {"width": 8}}[model]
    return models.create(model, (8, 8, 1), 10, seed=0, **sizes)


def setup(name, perturbation="ce", model="mlp", **options):
    apply, params, stats = small(model)
    method = made(name, perturbation)
    state = train_step.init_state(params, stats, method, KEY)
    return apply, train_step.make_step(apply, method, LOSS, **options), state


@functools.cache
def trained(name, perturbation="ce", model="mlp", **options):
    """The first state, and states and losses of six steps on the same batch."""
    _, step, state = setup(name, perturbation, model, **options)
    step, states, losses = jax.jit(step), [state], []
    for _ in range(STEPS):
        state, loss = step(state, BATCH)
        states.append(state)
        losses.append(loss)
    return states, losses


@functools.cache
def clean_pass(model):
    apply, params, stats = small(model)
    return jax.jit(functools.partial(apply, train=True))(params, stats, BATCH.images)


def check(name, perturbation="ce", model="mlp"):
    """Losses and statistics are those of the clean pass, and training lowers the loss."""
    states, losses = trained(name, perturbation, model)
    new = states[1]
    logits, clean_stats = clean_pass(model)
    chex.assert_trees_all_close(new.stats, clean_stats, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses[0], LOSS(logits, BATCH.labels).mean(), rtol=1e-5)
    assert [state.step for state in states] == list(range(STEPS + 1))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", IN_DEFAULT)
def test_a_step_lowers_the_loss_and_moves_the_statistics_once(name):
    check(name)


def test_a_step_of_a_convolutional_network():
    check("bisam-log", model="cnn")


@pytest.mark.slow
def test_every_method_with_every_loss_trains_and_no_two_are_the_same():
    all_of_them = [(name, "ce") for name, spec in METHODS.items() if not spec.attack]
    # The library's tests have Q for every method.
    all_of_them += [(name, "log") for name in ("sam", "gsam")]
    for name, perturbation in all_of_them:
        check(name, perturbation)
    runs = {run: trained(*run) for run in all_of_them if run != ("sam", "log")}
    params = {name: flat(states[2].params) for name, (states, _) in runs.items()}
    for name, other in itertools.combinations(params, 2):
        assert np.linalg.norm(params[name] - params[other]) > 1e-5, (name, other)
    same = flat(trained("sam", "log")[0][2].params)
    assert np.linalg.norm(same - params["bisam-log", "ce"]) < 1e-6


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_plain_training_takes_one_gradient():
    flops = {}
    for name in ("sgd", "bisam-log"):
        _, step, state = setup(name)
        flops[name] = jax.jit(step).lower(state, BATCH).compile().cost_analysis()["flops"]
    assert 1.8 < flops["bisam-log"] / flops["sgd"] < 2.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "perturbation"),
    [("bisam-log", "ce"), ("sparse-fisher", "ce")],
)
def test_microbatches_give_the_step_of_the_whole_batch(name, perturbation):
    size = {"depth": 1, "width": 8, "heads": 2}
    apply, params, _ = models.create("vit_tiny", (8, 8, 1), 10, seed=0, **size)
    method = made(name, perturbation)
    first = train_step.init_state(params, {}, method, KEY)
    results = []
    for size in (None, 10):
        step = jax.jit(train_step.make_step(apply, method, LOSS, microbatch_size=size))
        state, losses = first, []
        # The first step of sampa differs from the others.
        for _ in range(2):
            state, loss = step(state, BATCH)
            losses.append(loss)
        results.append((state.params, losses))
    whole, accumulated = results
    chex.assert_trees_all_close(accumulated[0], whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(accumulated[1], whole[1], rtol=1e-5)


def test_microbatches_are_computed_one_after_another():
    seen = []
    apply, _, state = setup("bisam-log")

    def spy(params, stats, images, *, train, keys=None):
        seen.append(len(images))
        return apply(params, stats, images, train=train, keys=keys)

    step = train_step.make_step(spy, made("bisam-log"), LOSS, microbatch_size=10)
    jax.eval_shape(step, state, BATCH)
    assert 10 in seen


def test_groups_are_perturbed_separately():
    """A step is the mean of steps on each group, as the definition says."""
    apply, params, stats = small("mlp")
    method = made("bisam-log", optimizer=optax.sgd(1.0))
    state = train_step.init_state(params, stats, method, KEY)
    single = jax.jit(train_step.make_step(apply, method, LOSS))
    groups = [jax.tree.map(lambda x, i=i: x[i : i + 20], BATCH) for i in (0, 20)]
    expected = [single(state, group) for group in groups]
    step = train_step.make_step(apply, method, LOSS, group_size=20)
    grouped, loss = jax.jit(step)(state, BATCH)
    for tree in ("params", "stats"):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *(getattr(e[0], tree) for e in expected))
        chex.assert_trees_all_close(getattr(grouped, tree), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, (expected[0][1] + expected[1][1]) / 2, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tilted", "efficient", "look"])
def test_groups_of_other_methods(name):
    _, losses = trained(name, group_size=20)
    assert losses[-1] < losses[0]


def without_keys(state):
    def data(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(data, state)


@pytest.mark.parametrize(
    "name",
    [
        "look",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gsam", "efficient")),
    ],
)
def test_before_the_start_and_between_the_steps_is_plain_training(name):
    when = train_step.whenever(2, 3)
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
    assert train_step.whenever(0, 1) is None


def test_a_single_example_takes_the_running_statistics():
    apply, _, state = setup("sparse-fisher")
    seen = []

    def spy(params, stats, images, *, train, keys=None):
        seen.append((len(images), train, keys is None))
        return apply(params, stats, images, train=train, keys=keys)

    jax.eval_shape(train_step.make_step(spy, made("sparse-fisher"), LOSS), state, BATCH)
    assert set(seen) == {(40, True, False), (1, False, True)}


@pytest.mark.parametrize(
    "name",
    [
        "bisam-log",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gsam", "efficient")),
    ],
)
def test_all_passes_of_a_step_give_an_example_the_same_dropout_key(name):
    seen = []
    apply, params, stats = small("mlp")

    def note(pixels, keys):
        # The first pixels of the images are all different.
        seen.append(dict(zip(pixels.tolist(), map(bytes, keys), strict=True)))

    def spy(params, stats, images, *, train, keys=None):
        jax.debug.callback(note, images[:, 0, 0, 0], jax.random.key_data(keys), ordered=True)
        return apply(params, stats, images, train=train)

    method = made(name, "log")
    state = train_step.init_state(params, stats, method, KEY)
    step = jax.jit(train_step.make_step(spy, method, LOSS))
    state, _ = step(state, BATCH)
    jax.effects_barrier()
    first, *others = list(seen)
    step(state, BATCH)
    jax.effects_barrier()
    assert len(set(first.values())) == 40
    assert others
    for keys in others:
        assert keys.items() <= first.items()
    assert not set(seen[-1].values()) & set(first.values())


def test_keys_are_different_and_the_same_at_every_step():
    _, _, state = setup("sgd")
    keys = train_step.keys_of(state)
    assert len({str(key) for key in keys}) == 3
    later = train_step.keys_of(state._replace(step=jnp.int32(7)))
    assert list(map(str, later)) == list(map(str, keys))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_over_the_other_classes(smoothing):
    logits = jnp.array([[1.0, 2.0, 4.0]])
    log_p = np.asarray(jax.nn.log_softmax(logits))[0]
    expected = -(1 - smoothing) * log_p[1] - smoothing / 2 * (log_p[0] + log_p[2])
    loss = train_step.cross_entropy(smoothing)(logits, jnp.array([1]))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
