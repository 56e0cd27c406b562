"""`jax.jit` without effort on machine code, which is what most of the suite's time would go to.

XLA's passes over the program are the same: FLOPs and memory do not differ by a byte. Tests of
numbers at the edge of a dtype's range, or against closed forms and published ones, keep `jax.jit`.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
