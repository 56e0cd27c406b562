import pytest


@pytest.fixture(autouse=True)
def as_a_user(settings_of_a_user):
    """Readers of the recipes have JAX's defaults."""
