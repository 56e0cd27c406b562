"""The request of a user: options, the methods, the resolved recipe.

Nothing here reads a clock, a disk or a device, or computes a step.
"""
