"""Settings that turn mistakes into errors, made before JAX starts."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.experimental
import pytest
from hypothesis import HealthCheck, settings

FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# Compilation takes nearly all of the time, and half as long without these emitters. XLA stops at an
# unknown flag, so only versions of JAX that were tried get it.
if jax.__version_info__ < (0, 11):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join(FLAGS)

# Compilation dominates: most programs run a few steps. Nor does a program need the places in the
# source that each of its operations comes from.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Every traced program stays in memory, and the usual collections would walk through all of them.
gc.set_threshold(200_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Puts tests first that mostly wait for processes of their own: others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


# No deadlines: compilation dominates the suite, and its speed differs between machines.
settings.register_profile(
    "repository",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repository")


# JAX 0.7 has it under another name, which raises a warning in later versions.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


@pytest.fixture(autouse=True)
def compilation(request):
    """Compiles quickly, unless the test is marked to run as for a user."""
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture
def float64():
    with enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Allows the parts of optax that promote step counts to floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def settings_of_a_user(standard_promotion):
    """JAX's defaults: flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield
