"""How much memory a run takes, and how much there is."""

import resource
import sys
from typing import Any

import jax
import psutil


def peak_bytes() -> int:
    """The most that was in use so far: of the first device, or of the process on CPU."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes() -> int:
    """What is free now: on the first device, or in the machine on CPU."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return psutil.virtual_memory().available


def of_program(compiled: Any) -> int:
    """What a compiled program takes on a device, its arguments included."""
    parts = compiled.memory_analysis()
    sizes = parts.argument_size_in_bytes + parts.output_size_in_bytes + parts.temp_size_in_bytes
    return sizes - parts.alias_size_in_bytes
