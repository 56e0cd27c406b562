"""How much memory a run took."""

import resource
import sys

import jax


def peak_bytes() -> int:
    """The most that was in use so far: of the first device, or of the process on CPU."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
