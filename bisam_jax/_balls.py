"""The choice of a method's perturbation: the user's own, or a ball with the method's radius."""

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
    """Returns the user's `perturbation`, or an `l2_ball` of radius `rho` if it is None.

    Args:
        perturbation: maps the ascent gradient to eps, or None.
        rho: radius of the method.
        name: name of the radius argument, used in messages.
        default: default radius, used to tell whether the user set the radius too.

    Raises:
        TypeError: if `perturbation` is not an optax transformation.
        ValueError: if both were given, since `rho` would silently have no effect.
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
            f"{name} and perturbation were both given, and {name} would have no effect: "
            f"leave out {name}."
        )
    return optax.with_extra_args_support(perturbation)
