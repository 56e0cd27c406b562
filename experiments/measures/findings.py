"""What to measure around trained networks, and one measured number."""

import dataclasses
from typing import NamedTuple


class Finding(NamedTuple):
    """One measured number of one network.

    Attributes:
        network: name of the networks that differ only in their seed.
        seed: random seed.
        quantity: what was measured.
        ball: "l2", "adaptive l2", or "" for what has no ball.
        at: radius, number of an eigenvalue, place in a spectrum or in a slice; NaN for one number.
        value: the number.
        uncertainty: its standard error, or the residual of an eigenvalue; NaN if it is exact.
    """

    network: str
    seed: int
    quantity: str
    ball: str
    at: float
    value: float
    uncertainty: float


@dataclasses.dataclass(frozen=True)
class Measures:
    """What to measure.

    Attributes:
        radii: radii of l2 balls.
        adaptive_radii: radii of adaptive l2 balls.
        steps: number of gradients of the ascent to the worst case.
        directions: number of random directions.
        eigenvalues: number of largest eigenvalues.
        num_matvecs: number of products with the Hessian, for the eigenvalues and for each probe of
            the spectrum.
        normalised_logits: whether the logits are normalized.
        microbatch_size: number of examples in memory at a time; None for all.
    """

    radii: tuple[float, ...]
    adaptive_radii: tuple[float, ...]
    steps: int
    directions: int
    eigenvalues: int
    num_matvecs: int
    normalised_logits: bool
    microbatch_size: int | None
