"""`jax.jit` without optimized machine code, which would take most of the suite's time.

XLA's passes over the program are the same, so FLOPs and memory are exactly the same. Tests of
numbers at the edge of a dtype's range, or against closed forms and published numbers, keep
`jax.jit`.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
