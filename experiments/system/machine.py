"""The machine: memory, cores, hardware and software versions."""

import contextlib
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import psutil

import bisam_jax


def peak_bytes() -> int:
    """Returns the peak memory use so far: of the first device, or of the process on CPU."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes() -> int:
    """Returns the free memory: of the first device, or of the machine on CPU."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics is not None:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return psutil.virtual_memory().available


def program_bytes(compiled: Any) -> int:
    """Returns the memory that a compiled program takes per device, including its arguments."""
    parts = compiled.memory_analysis()
    sizes = parts.argument_size_in_bytes + parts.output_size_in_bytes + parts.temp_size_in_bytes
    return sizes - parts.alias_size_in_bytes


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Returns the software versions that results depend on."""
    return {
        "bisam_jax": bisam_jax.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def hardware() -> dict[str, Any]:
    """Returns the device kind, the number of devices, the processor and its cores."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "processor": _processor(),
        "cores": cores(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def make_cores_devices() -> None:
    """Makes every CPU core a device, which trains its own replicas.

    XLA runs a batched matrix product on only one core.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not given and getattr(jax.config, "jax_num_cpu_devices", -1) < 1:
        with contextlib.suppress(RuntimeError):  # JAX has started already
            jax.config.update("jax_num_cpu_devices", cores())
