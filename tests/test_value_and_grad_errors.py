"""Arguments that `value_and_grad` and its step refuse, and the messages."""

import jax
import jax.numpy as jnp
import optax
import pytest

from bisam_jax import bisam, efficient_sam, sam, value_and_grad
from tests.problems import (
    loss_of_batch,
    losses_of_batch,
    mlp_batch,
    mlp_logits,
    mlp_params,
    perturbation_loss_of_batch,
    with_aux,
)

PARAMS, BATCH = mlp_params(), mlp_batch()
SAM, BISAM = sam(rho=0.3), bisam(rho=0.3)


def step_with(**arguments):
    batch = arguments.pop("batch", BATCH)
    q = arguments.pop("q", None)
    loss_fn = arguments.pop("loss_fn", loss_of_batch)
    tx, extra = arguments.pop("tx", SAM), arguments.pop("extra", {})
    step = value_and_grad(tx, loss_fn, q, **arguments)
    return step(PARAMS, tx.init(PARAMS), batch, **extra)


def by_group_with_optimizer():
    return {"group_size": 4, "tx": optax.chain(BISAM, optax.sgd(0.1, momentum=0.9))}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"group_size": 5},
            ValueError,
            "group_size must divide the batch, got group_size=5 for 16",
        ),
        ({"microbatch_size": 32}, ValueError, "microbatch_size must divide the batch"),
        ({"group_size": 0}, ValueError, "group_size must be a positive integer or None, got 0"),
        ({"microbatch_size": 2.0}, ValueError, "microbatch_size must be a positive integer"),
        (
            {"group_size": 8, "microbatch_size": 4},
            ValueError,
            "microbatch_size must be a multiple of group_size, got 4 and 8",
        ),
        (
            {"group_size": 4, "batch": {**BATCH, "key": jax.random.key(0)}},
            ValueError,
            r"batch\['key'\] is a scalar",
        ),
        (
            {"group_size": 4, "batch": {**BATCH, "y": BATCH["y"][:8]}},
            ValueError,
            "the arrays of batch must have the same number of examples",
        ),
        (
            {
                "loss_fn": lambda p, b: (loss_of_batch(p, b), b["x"].T),
                "has_aux": True,
                "group_size": 4,
            },
            TypeError,
            "can be neither joined nor averaged",
        ),
        (
            {"has_aux": True},
            TypeError,
            r"with has_aux=True, loss_fn must return \(loss, aux\)",
        ),
        (
            {
                "loss_fn": with_aux(loss_of_batch),
                "has_aux": True,
                "q": perturbation_loss_of_batch,
            },
            TypeError,
            r"with has_aux=True, perturbation_loss_fn must return \(loss, aux\)",
        ),
        ({"loss_fn": with_aux(loss_of_batch)}, TypeError, "loss_fn must return .* has_aux=True"),
        (
            {"q": lambda p, b: mlp_logits(p, b["x"])},
            TypeError,
            r"perturbation_loss_fn must return one real floating scalar, or one loss per example "
            r"of the batch, floating\[16\], got float32\[16, 3\]",
        ),
        (
            {"loss_fn": lambda p, b: mlp_logits(p, b["x"])[:4, 0]},
            TypeError,
            r"loss_fn must return .*floating\[16\], got float32\[4\]",
        ),
        ({"loss_fn": lambda p, b: b["y"]}, TypeError, r"loss_fn must return .*got int32\[16\]"),
        ({"loss_fn": None}, TypeError, "loss_fn must be a function of"),
        ({"q": 1.0}, TypeError, "perturbation_loss_fn must be a function of"),
        ({"when": True}, TypeError, "when must be a function of the step, got True"),
        ({"when": lambda step: step, "extra": {"step": 3}}, TypeError, "when must return one bool"),
        (
            {"when": lambda step: step > 3},
            ValueError,
            r"step is missing: .* step\(..., step=step\)",
        ),
        ({"axis_name": 0}, TypeError, "axis_name must be the name of one mapped axis, got 0"),
        ({"axis_name": "batch"}, ValueError, "axis_name 'batch' is not a mapped axis here"),
        (
            {"tx": optax.named_chain(("sgd", optax.sgd(0.1)), ("sam", SAM))},
            ValueError,
            "optax.named_chain does not show whether",
        ),
        (
            {
                "tx": optax.conditionally_transform(BISAM, lambda step: step > 3),
                "q": perturbation_loss_of_batch,
            },
            ValueError,
            "pass the method itself, and when= to",
        ),
        (
            {"tx": optax.apply_if_finite(BISAM, 3), "q": perturbation_loss_of_batch},
            ValueError,
            "apply_if_finite can come after the method",
        ),
        (
            {"tx": optax.MultiSteps(SAM, 2).gradient_transformation()},
            ValueError,
            "tx must pass extra arguments on",
        ),
        (
            {"group_size": 4, "extra": {"example_losses_fn": lambda p, i=None: p}},
            ValueError,
            "example_losses_fn cannot be passed with group_size",
        ),
        (
            {
                "tx": efficient_sam(0.1),
                "loss_fn": losses_of_batch,
                "batch": BATCH | {"temperature": jnp.float32(1)},
            },
            ValueError,
            r"batch\['temperature'\] is a scalar",
        ),
        (by_group_with_optimizer(), ValueError, "group_size needs a tx that is only the method"),
        (
            {
                "when": lambda step: step > 3,
                "extra": {"step": 3},
                "tx": optax.chain(SAM, optax.sgd(1)),
            },
            ValueError,
            "when needs a tx that is only the method, got a chain",
        ),
        (
            {"tx": optax.chain(optax.sgd(0.1), SAM)},
            ValueError,
            "method is number 2 in its chain, and must be the first",
        ),
        (
            {"tx": optax.chain(optax.sgd(0.1), BISAM), "q": perturbation_loss_of_batch},
            ValueError,
            "method is number 2 in its chain, and must be the first",
        ),
        (
            {"extra": {"perturbation_loss_fn": lambda p: 0.0}},
            ValueError,
            "perturbation_loss_fn cannot be passed to the step",
        ),
        ({"tx": BISAM}, ValueError, "pass perturbation_loss_fn to value_and_grad; .* use sam"),
        (
            {"tx": efficient_sam(0.1)},
            ValueError,
            "one loss per example, and loss_fn returns their mean: return one loss per example",
        ),
        (
            {
                "loss_fn": lambda p, b: (loss_of_batch(p, b), {"correct": jnp.array(3)}),
                "has_aux": True,
                "group_size": 4,
            },
            TypeError,
            r"the aux leaf at \['correct'\], int32\[\], can be neither joined nor averaged",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        step_with(**arguments)


@pytest.mark.parametrize(
    "q", [lambda p, b: (loss_of_batch(p, b), None), lambda p, b: (loss_of_batch(p, b), {"a": 1.0})]
)
def test_when_needs_the_same_aux_of_both(q):
    step = value_and_grad(
        BISAM, with_aux(loss_of_batch), q, has_aux=True, when=lambda step: step > 3
    )
    message = "with when, loss_fn and perturbation_loss_fn must return value and aux of the same"
    with pytest.raises(TypeError, match=message):
        jax.jit(step)(PARAMS, BISAM.init(PARAMS), BATCH, step=3)
