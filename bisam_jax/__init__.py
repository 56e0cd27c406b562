"""Bilevel Sharpness-Aware Minimization (BiSAM) and the SAM family as optax transformations."""

from bisam_jax._bilateral import BilateralState, bilateral_sam
from bisam_jax._curvature import (
    Eigenvalues,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
)
from bisam_jax._dynamic_mask import DynamicMaskState, dynamic_mask, sparse_sam_dynamic
from bisam_jax._efficient import efficient_sam
from bisam_jax._estimates import Estimate
from bisam_jax._fisher_mask import FisherMaskState, fisher_mask, fisher_scores, sparse_sam_fisher
from bisam_jax._friendly import FriendlyState, friendly, friendly_sam
from bisam_jax._functional import functional_sam, logits_loss
from bisam_jax._gsam import gsam
from bisam_jax._look import LookState, look_sam
from bisam_jax._products import gauss_newton_product, hessian_product
from bisam_jax._random_subset import RandomSubsetState, random_subset
from bisam_jax._sampa import SampaState, sampa
from bisam_jax._sharpness import Sharpness, average_sharpness, sharpness
from bisam_jax._sharpness_aware import SharpnessAwareState, asam, bisam, sam, sharpness_aware
from bisam_jax._tilted import TiltedState, tilted_sam
from bisam_jax._value_and_grad import value_and_grad
from bisam_jax._weighted import weighted_sam
from bisam_jax.losses import log_lower_bound, margins, perturbation_loss, tanh_lower_bound
from bisam_jax.perturbations import ScheduledRadiusState, adaptive_l2_ball, l2_ball, linf_ball

__version__ = "0.2.0"

__all__ = [
    "BilateralState",
    "DynamicMaskState",
    "Eigenvalues",
    "Estimate",
    "FisherMaskState",
    "FriendlyState",
    "LookState",
    "RandomSubsetState",
    "SampaState",
    "ScheduledRadiusState",
    "Sharpness",
    "SharpnessAwareState",
    "TiltedState",
    "adaptive_l2_ball",
    "asam",
    "average_sharpness",
    "bilateral_sam",
    "bisam",
    "dynamic_mask",
    "efficient_sam",
    "fisher_mask",
    "fisher_scores",
    "friendly",
    "friendly_sam",
    "functional_sam",
    "gauss_newton_product",
    "gsam",
    "hessian_eigenvalues",
    "hessian_product",
    "hessian_trace",
    "l2_ball",
    "linf_ball",
    "log_lower_bound",
    "logits_loss",
    "look_sam",
    "margins",
    "perturbation_loss",
    "random_subset",
    "sam",
    "sampa",
    "sharpness",
    "sharpness_aware",
    "sparse_sam_dynamic",
    "sparse_sam_fisher",
    "spectral_density",
    "tanh_lower_bound",
    "tilted_sam",
    "value_and_grad",
    "weighted_sam",
]
