"""The perturbation of a method: a ball of its radius, or another that replaces it."""

import math

import optax
from jax.core import Tracer

from bisam_jax._checks import check_scalar, check_transformation
from bisam_jax.perturbations import l2_ball


def l2_ball_unless(
    perturbation: optax.GradientTransformation | None,
    rho: optax.ScalarOrSchedule,
    name: str = "rho",
    default: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """The `perturbation` of a method's user, or an `l2_ball` of radius `rho` without one.

    Args:
        perturbation: from the ascent gradient to eps, or None.
        rho: the method's radius.
        name: of that argument, for messages.
        default: its default, to tell whether it was given too.

    Raises:
        TypeError: if `perturbation` is no transformation.
        ValueError: if both were given: one of them would silently have no effect.
    """
    if not callable(rho):
        check_scalar(name, rho, minimum=0.0)
    if perturbation is None:
        return l2_ball(rho)
    check_transformation("perturbation", perturbation)
    # Under inject_hyperparams the default arrives as an array, rounded to the parameters' dtype.
    is_default = not callable(rho) and (
        isinstance(rho, Tracer) or math.isclose(float(rho), default, rel_tol=0.01)
    )
    if not is_default:
        raise ValueError(
            f"{name} and perturbation were both given, and the radius is that of perturbation: "
            f"leave out {name}."
        )
    return optax.with_extra_args_support(perturbation)
