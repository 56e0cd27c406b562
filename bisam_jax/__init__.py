"""Bilevel Sharpness-Aware Minimization (BiSAM) as optax transformations."""

from bisam_jax.bilateral import BilateralState as BilateralState
from bisam_jax.bilateral import bilateral_sam as bilateral_sam
from bisam_jax.efficient import RandomSubsetState as RandomSubsetState
from bisam_jax.efficient import efficient_sam as efficient_sam
from bisam_jax.efficient import random_subset as random_subset
from bisam_jax.friendly import FriendlyState as FriendlyState
from bisam_jax.friendly import friendly as friendly
from bisam_jax.friendly import friendly_sam as friendly_sam
from bisam_jax.gradients import value_and_grad as value_and_grad
from bisam_jax.gsam import gsam as gsam
from bisam_jax.losses import log_lower_bound as log_lower_bound
from bisam_jax.losses import margins as margins
from bisam_jax.losses import perturbation_loss as perturbation_loss
from bisam_jax.losses import tanh_lower_bound as tanh_lower_bound
from bisam_jax.perturbations import ScheduledRadiusState as ScheduledRadiusState
from bisam_jax.perturbations import adaptive_l2_ball as adaptive_l2_ball
from bisam_jax.perturbations import l2_ball as l2_ball
from bisam_jax.sampa import SampaState as SampaState
from bisam_jax.sampa import sampa as sampa
from bisam_jax.sharpness_aware import SharpnessAwareState as SharpnessAwareState
from bisam_jax.sharpness_aware import asam as asam
from bisam_jax.sharpness_aware import bisam as bisam
from bisam_jax.sharpness_aware import sam as sam
from bisam_jax.sharpness_aware import sharpness_aware as sharpness_aware
from bisam_jax.sparse import DynamicMaskState as DynamicMaskState
from bisam_jax.sparse import FisherMaskState as FisherMaskState
from bisam_jax.sparse import dynamic_mask as dynamic_mask
from bisam_jax.sparse import fisher_mask as fisher_mask
from bisam_jax.sparse import fisher_scores as fisher_scores
from bisam_jax.sparse import sparse_sam_dynamic as sparse_sam_dynamic
from bisam_jax.sparse import sparse_sam_fisher as sparse_sam_fisher
from bisam_jax.tilted import TiltedState as TiltedState
from bisam_jax.tilted import tilted_sam as tilted_sam

__version__ = "0.1.0"
