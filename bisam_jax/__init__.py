"""Bilevel Sharpness-Aware Minimization (BiSAM) as optax transformations."""

from bisam_jax.gradients import value_and_grad as value_and_grad
from bisam_jax.losses import log_lower_bound as log_lower_bound
from bisam_jax.losses import margins as margins
from bisam_jax.losses import perturbation_loss as perturbation_loss
from bisam_jax.losses import tanh_lower_bound as tanh_lower_bound
from bisam_jax.perturbations import ScheduledRadiusState as ScheduledRadiusState
from bisam_jax.perturbations import adaptive_l2_ball as adaptive_l2_ball
from bisam_jax.perturbations import l2_ball as l2_ball
from bisam_jax.sharpness_aware import SharpnessAwareState as SharpnessAwareState
from bisam_jax.sharpness_aware import asam as asam
from bisam_jax.sharpness_aware import bisam as bisam
from bisam_jax.sharpness_aware import sam as sam
from bisam_jax.sharpness_aware import sharpness_aware as sharpness_aware

__version__ = "0.1.0"
