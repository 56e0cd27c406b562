import jax
import pytest


@pytest.fixture(autouse=True)
def settings_of_a_user(standard_promotion):
    """The experiments run under JAX's defaults: flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield
