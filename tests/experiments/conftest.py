import pytest

from experiments import models
from tests.experiments.small import patch_mlp


@pytest.fixture(autouse=True)
def as_a_user(settings_of_a_user):
    """The experiments run under JAX's defaults."""


@pytest.fixture
def small_vit(monkeypatch):
    """A transformer with dropout that is quick to train, as vit_tiny."""

    def vit(*args, **options):
        return models.ViT(*args, **options, width=8, heads=2, depth=1, dropout=0.3)

    architecture = models.Architecture(vit)
    monkeypatch.setitem(models.ARCHITECTURES, "vit_tiny", architecture)


@pytest.fixture
def small_mlp(monkeypatch):
    """A narrow perceptron with one hidden layer, as mlp."""
    patch_mlp(monkeypatch)
