"""The code of every recipe runs as it stands, and does what its page says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bisam_jax

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
PAGES = sorted(path.stem for path in RECIPES.glob("*.md") if path.stem != "index")
PARAMS = {"w": 0.1 * jax.random.normal(jax.random.key(1), (8, 3)), "b": jnp.zeros(3)}
TWO_LAYERS = {
    "w": 0.3 * jax.random.normal(jax.random.key(2), (8, 16)),
    "v": 0.1 * jnp.ones((16, 3)),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def ranks_of_a_user():
    with jax.numpy_rank_promotion("allow"):
        yield


def code_of(page):
    text = (RECIPES / f"{page}.md").read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))


def names_of(page):
    names = {}
    exec(code_of(page), names)
    return names


def a_batch(examples=64):
    x = jax.random.normal(jax.random.key(0), (examples, 8))
    return {"x": x, "y": (x[:, :2] > 0).sum(1)}


def softmax_losses(params, batch):
    logits = batch["x"] @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def q(params, batch):
    return bisam_jax.perturbation_loss(batch["x"] @ params["w"] + params["b"], batch["y"])


def reference(params, batch, method, base, *losses):
    """Returns the parameters after one step of a method and its base optimizer."""
    tx = optax.chain(method, base)
    step = bisam_jax.value_and_grad(tx, *losses)
    return optax.apply_updates(params, step(params, tx.init(params), batch)[1])


def after_bisam(batch):
    base = optax.sgd(0.1, momentum=0.9)
    return reference(PARAMS, batch, bisam_jax.bisam(0.05), base, softmax_losses, q)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


def moved(before, after):
    return float(optax.tree.norm(optax.tree.sub(after, before)))


@pytest.mark.parametrize("page", PAGES)
def test_page_is_short_and_named_in_the_index(page):
    text = (RECIPES / f"{page}.md").read_text()
    assert text.count("\n") <= 40
    assert "```python\n" in text
    assert f"({page}.md)" in (RECIPES / "index.md").read_text()
    assert f"def test_{page.replace('-', '_')}(" in Path(__file__).read_text()


def test_nnx():
    names, batch = names_of("nnx"), a_batch()
    carry = [names[name] for name in ("params", "stats", "rngs", "state", "optimizer_state")]
    first, values = carry, []
    for _ in range(30):
        *carry, value = names["train_step"](*carry, batch)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    assert moved(first[1], carry[1]) > 0  # batch statistics
    counts = [
        [leaf for leaf in jax.tree.leaves(c[2]) if leaf.dtype == jnp.uint32] for c in (first, carry)
    ]
    assert counts[0] != counts[1]  # another step draws other masks
    assert both_passes_draw_the_same(names, first, batch)


def both_passes_draw_the_same(names, carry, batch):
    """Returns whether the step is that of the network with the first step's masks."""
    params, stats, rngs, *_ = carry
    nnx, graphdef = names["nnx"], names["graphdef"]

    def of_logits(loss):
        def fn(params, batch):
            net = nnx.merge(graphdef, params, stats, rngs, copy=True)
            return loss(net(batch["x"]), batch["y"]).mean()

        return fn

    cross_entropy = of_logits(optax.losses.softmax_cross_entropy_with_integer_labels)
    eps = jax.grad(of_logits(bisam_jax.perturbation_loss))(params, batch)
    norm = optax.tree.norm(eps)
    point = jax.tree.map(lambda w, e: w + 0.05 * e / norm, params, eps)
    grads = jax.grad(cross_entropy)(point, batch)
    updates, _ = names["optimizer"].update(grads, carry[4], params)
    expected = optax.apply_updates(params, updates)
    ours = names["train_step"](*carry, batch)[0]
    return moved(expected, ours) < 1e-3 * moved(params, ours)


def test_linen():
    names, batch = names_of("linen"), a_batch()
    state, values = names["state"], []
    for _ in range(30):
        state, value = names["train_step"](state, batch)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    assert state.step == 30


def test_equinox():
    names, batch = names_of("equinox"), a_batch()
    carry, values = [names[name] for name in ("params", "state", "optimizer_state")], []
    for _ in range(30):
        *carry, value = names["train_step"](*carry, batch)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    model = names["eqx"].combine(carry[0], names["static"])
    assert jax.vmap(model)(batch["x"]).shape == (64, 3)


@pytest.mark.filterwarnings("default")  # of Keras
def test_keras():
    names, batch = names_of("keras"), a_batch()
    model = names["model"]
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"], np.int32)
    history = model.fit(x, y, epochs=20, batch_size=32, verbose=0).history["perturbation_loss"]
    assert history[-1] < 0.5 * history[0]
    assert (model.predict(x, verbose=0).argmax(-1) == y).mean() > 0.8


def test_gradient_loops():
    jaxopt = pytest.importorskip("jaxopt")
    names, batch = names_of("gradient-loops"), a_batch()
    solver = jaxopt.OptaxSolver(
        opt=optax.adam(1e-2), fun=names["value_and_gradient"], value_and_grad=True
    )
    state = solver.init_state(PARAMS, batch=batch)
    params, _ = solver.update(PARAMS, state, batch=batch)
    assert_close(
        params, reference(PARAMS, batch, bisam_jax.bisam(0.05), optax.adam(1e-2), softmax_losses, q)
    )


def test_frozen_and_lora():
    names, batch = names_of("frozen-and-lora"), a_batch()
    params, tx = names["params"], names["tx"]
    _, updates, _ = names["step"](params, tx.init(params), batch)
    assert moved(params["head"], params["head"] + updates["head"]) > 0
    ball = names["perturbed"]
    eps, _ = ball.update(jax.tree.map(jnp.ones_like, params), ball.init(params), params)
    assert not eps["head"].any()
    np.testing.assert_allclose(optax.tree.norm(eps), 0.05, **CLOSE)
    state = bisam_jax.sharpness_aware(ball).init(params)
    assert moved(names["head_kept"](params, state, batch)[1], params) > 0


def test_token_masks():
    names = names_of("token-masks")
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (11, 4)),
        "out": jax.random.normal(keys[1], (4, 11)),
    }
    tokens = jax.random.randint(keys[2], (4, 6), 0, 11)
    labels = jnp.roll(tokens, 1, 1).at[:, 4:].set(names["IGNORED"])
    batch, short = (
        {"tokens": tokens, "labels": labels},
        {"tokens": tokens[:, :4], "labels": labels[:, :4]},
    )
    tx = names["tx"]
    padded = names["step"](params, tx.init(params), batch)
    unpadded = names["step"](params, tx.init(params), short)
    assert_close(padded[:2], unpadded[:2])


def test_multi_label():
    names, batch = names_of("multi-label"), a_batch()
    batch |= {"y": (batch["x"][:, :3] > 0).astype(jnp.int32)}
    tx = names["tx"]
    params = jax.tree.map(lambda x: 20 * x, PARAMS)
    losses = names["perturbation_loss_fn"](params, batch)
    wrong = ((names["logits_of"](params, batch) > 0) != batch["y"]).mean(-1)
    assert (losses <= wrong + np.log(2) + 1e-5).all()
    _, updates, _ = names["step"](PARAMS, tx.init(PARAMS), batch)
    before, after = (
        names["loss_fn"](p, batch).mean() for p in (PARAMS, optax.apply_updates(PARAMS, updates))
    )
    assert after < before


def test_regression():
    names, batch = names_of("regression"), a_batch()
    params = {"w": PARAMS["w"], "v": jnp.ones((3, 1))}
    batch |= {"y": batch["x"][:, 0]}
    miss = jnp.abs(names["predict"](params, batch) - batch["y"])
    bound = names["perturbation_loss_fn"](params, batch)
    assert (bound <= (miss > names["TOLERANCE"])).all()
    tx = names["tx"]
    _, updates, _ = names["step"](params, tx.init(params), batch)
    assert moved(params, optax.apply_updates(params, updates)) > 0


def test_mixup():
    names, batch = names_of("mixup"), a_batch()
    mixed, tx = names["mixed_up"](jax.random.key(3), batch), names["tx"]
    _, updates, _ = names["step"](PARAMS, tx.init(PARAMS), mixed)
    assert moved(PARAMS, optax.apply_updates(PARAMS, updates)) > 0
    logits = names["logits_of"](PARAMS, mixed)
    share, classes = mixed["share"][:, None], jnp.eye(3)
    target = share * classes[mixed["y"]] + (1 - share) * classes[mixed["other"]]
    soft = names["soft_perturbation_loss"](logits, target)
    np.testing.assert_allclose(soft, names["mixed"](names["losses"][1])(PARAMS, mixed), **CLOSE)


def test_mixed_precision():
    names, batch = names_of("mixed-precision"), a_batch()
    params = {"w": PARAMS["w"], "v": jnp.eye(3)}
    carry = [params, names["method"].init(params), names["optimizer"].init(params)]
    values = []
    for _ in range(30):
        *carry, value = names["train_step"](*carry, batch)
        values.append(value)
    assert values[-1] < 0.9 * values[0]
    huge = batch | {"x": 1e5 * batch["x"]}  # overflows in float16
    after = names["train_step"](*carry, huge)[0]
    assert moved(carry[0], after) == 0


@pytest.mark.parametrize("base", ["adam", "lion", "muon", "schedule-free"])
def test_optimizers(base):
    names, batch = names_of("optimizers"), a_batch()
    params = TWO_LAYERS
    tx, step = names["step_with"](names["bases"][base])
    state, first = tx.init(params), None
    for _ in range(20):
        value, updates, state = step(params, state, batch)
        params, first = optax.apply_updates(params, updates), value if first is None else first
    assert value < first
    if base == "schedule-free":
        averaged = names["contrib"].schedule_free_eval_params(state[-1], params)
        assert moved(params, averaged) > 0


def test_accumulation():
    names, batch = names_of("accumulation"), a_batch()
    whole, parts, base = names["whole"], names["parts"], names["base"]
    _, updates, _ = names["step"](PARAMS, whole.init(PARAMS), batch)
    method = bisam_jax.bisam(0.05)
    assert_close(
        optax.apply_updates(PARAMS, updates),
        reference(PARAMS, batch, method, base, *names["losses"]),
    )
    state = parts.init(PARAMS)
    for part in range(4):
        of_part = jax.tree.map(lambda x, part=part: x[16 * part : 16 * part + 16], batch)
        _, updates, state = names["part_step"](PARAMS, state, of_part)
    grouped = bisam_jax.value_and_grad(method, *names["losses"], group_size=16)
    _, grads, _ = grouped(PARAMS, method.init(PARAMS), batch)
    assert_close(updates, base.update(grads, base.init(PARAMS))[0])


def test_pmap():
    names, batch = names_of("pmap"), a_batch()
    given = names["split"](batch)
    params, _, _ = names["train_step"](PARAMS, names["tx"].init(PARAMS), given)
    assert_close(params, after_bisam(batch))


def test_shard_map():
    names, batch = names_of("shard_map"), a_batch()
    params, _, _ = names["train_step"](PARAMS, names["tx"].init(PARAMS), batch)
    assert_close(params, after_bisam(batch))


def test_fsdp():
    names, batch = names_of("fsdp"), a_batch()
    params = TWO_LAYERS
    placed = names["place"](params)
    after, _, _ = names["train_step"](placed, names["tx"].init(placed), names["place"](batch))
    assert after["w"].sharding.spec == placed["w"].sharding.spec
    assert len(after["w"].sharding.device_set) == jax.device_count()
    losses = [names["of_logits"](loss) for loss in names["losses"]]
    assert_close(after, reference(params, batch, bisam_jax.bisam(0.05), optax.adamw(1e-2), *losses))


def test_several_hosts():
    names, batch = names_of("several-hosts"), a_batch()
    params, state = names["params"], names["state"]
    rows = names["global_batch"](jax.tree.map(np.asarray, batch))
    after, _, _ = names["train_step"](params, state, rows)
    base = optax.sgd(0.1, momentum=0.9)
    assert_close(after, reference(params, batch, bisam_jax.bisam(0.05), base, softmax_losses, q))


def test_rho_schedule():
    names, batch = names_of("rho-schedule"), a_batch()
    tx, base = names["tx"], optax.sgd(0.1, momentum=0.9)
    _, updates, state = names["step"](PARAMS, tx.init(PARAMS), batch)
    plain = reference(PARAMS, batch, optax.identity(), base, softmax_losses)
    assert_close(optax.apply_updates(PARAMS, updates), plain)  # rho starts at 0
    assert state[0].perturbation_state.radius_count == 1
    adjustable = names["adjustable"]
    state = names["with_rho"](adjustable.init(PARAMS), 0.5)
    losses = softmax_losses, q
    _, updates, _ = bisam_jax.value_and_grad(adjustable, *losses)(PARAMS, state, batch)
    expected = reference(PARAMS, batch, bisam_jax.bisam(0.5), base, *losses)
    assert_close(optax.apply_updates(PARAMS, updates), expected)


def test_late_and_periodic():
    names, batch = names_of("late-and-periodic"), a_batch()
    base, losses = names["optimizer"], names["losses"]
    sharp = reference(PARAMS, batch, bisam_jax.bisam(0.05), base, *losses)
    plain = reference(PARAMS, batch, optax.identity(), base, losses[0])
    state = names["method"].init(PARAMS), base.init(PARAMS)
    for step, expected in ((999, plain), (1000, sharp)):
        assert_close(names["train_step"](PARAMS, *state, batch, step)[0], expected)
    grads = [names["periodic"](PARAMS, state[0], batch, step=step)[1] for step in (4, 5)]
    assert moved(*grads) > 1e-4


def test_checkpoints(tmp_path, monkeypatch):
    from experiments import train

    monkeypatch.chdir(tmp_path)
    train.main(["--epochs", "2", "--devices", "1", "--output", "runs/RUN"])
    names = names_of("checkpoints")
    assert names["logits"].shape == (10, 10)
    labels = names["dataset"].test.labels[:10]
    assert (names["logits"].argmax(-1) == labels).mean() > 0.7
    assert 0.7 < names["measured"]["test"]["accuracy"] <= 1


def test_reinforcement_learning():
    names = names_of("reinforcement-learning")
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w": 0.3 * jax.random.normal(keys[0], (8, 16)),
        "policy": 0.3 * jax.random.normal(keys[1], (16, 4)),
        "value": 0.3 * jax.random.normal(keys[2], (16, 1)),
    }
    observations = jax.random.normal(keys[3], (32, 8))
    actions = jax.random.randint(keys[4], (32,), 0, 4)
    log_p = jax.nn.log_softmax(names["network"](params, observations)[0])
    batch = {
        "observations": observations,
        "actions": actions,
        "log_p": jnp.take_along_axis(log_p, actions[:, None], axis=-1)[:, 0],
        "advantages": jax.random.normal(keys[5], (32,)),
        "returns": jnp.ones(32),
    }
    state, first = names["tx"].init(params), names["loss_fn"](params, batch).mean()
    for _ in range(20):
        _, updates, state = names["step"](params, state, batch)
        params = optax.apply_updates(params, updates)
    assert names["loss_fn"](params, batch).mean() < first


def test_own_perturbation():
    names, batch = names_of("own-perturbation"), a_batch()
    grads = jax.grad(lambda p: softmax_losses(p, batch).mean())(PARAMS)
    cube, _ = names["maximum_ball"](0.005).update(grads, optax.EmptyState(), PARAMS)
    assert {float(x) for x in jnp.abs(cube["w"]).ravel()} == {np.float32(0.005)}
    per_layer, _ = names["ball_per_layer"](0.05).update(grads, optax.EmptyState(), PARAMS)
    for leaf in per_layer.values():
        np.testing.assert_allclose(jnp.linalg.norm(leaf), 0.05, **CLOSE)
    tx = optax.chain(names["method"], optax.sgd(0.1))
    _, updates, _ = names["step"](PARAMS, tx.init(PARAMS), batch)
    eps = jax.tree.map(jnp.sign, jax.grad(lambda p: q(p, batch).mean())(PARAMS))
    point = jax.tree.map(lambda w, e: w + 0.005 * e, PARAMS, eps)
    expected = jax.grad(lambda p: softmax_losses(p, batch).mean())(point)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, expected))


def test_own_q():
    names, batch = names_of("own-q"), a_batch()
    params = jax.tree.map(lambda x: 20 * x, PARAMS)
    wrong = names["logits_of"](params, batch).argmax(-1) != batch["y"]
    assert (names["largest_margin"](params, batch) <= wrong).all()
    assert (names["perturbation_loss_fn"](params, batch) <= wrong + np.log(3) / 10 + 1e-6).all()
    _, updates, _ = names["step"](PARAMS, names["tx"].init(PARAMS), batch)
    assert moved(PARAMS, optax.apply_updates(PARAMS, updates)) > 0


def test_own_method():
    names, batch = names_of("own-method"), a_batch()
    tx, losses = names["tx"], names["losses"]
    for step, given, sharp in (
        (names["plain"], losses[:1], bisam_jax.sam(0.05)),
        (names["bilevel"], losses, bisam_jax.bisam(0.05)),
    ):
        _, updates, _ = step(PARAMS, tx.init(PARAMS), batch)
        perturbed = bisam_jax.value_and_grad(sharp, *given)(PARAMS, sharp.init(PARAMS), batch)[1]
        clean = jax.grad(lambda p: losses[0](p, batch).mean())(PARAMS)
        half = jax.tree.map(lambda g, p: (g + p) / 2, clean, perturbed)
        base = optax.adamw(1e-2)
        assert_close(updates, base.update(half, base.init(PARAMS), PARAMS)[0])


def test_from_optax_sam():
    names, batch = names_of("from-optax-sam"), a_batch()
    before, after = names["before"], names["after"]
    theirs, _ = names["step_before"](PARAMS, before.init(PARAMS), batch)
    _, ours, _ = names["step_after"](PARAMS, after.init(PARAMS), batch)
    assert_close(ours, theirs)
