"""One training step: its state, its method, its devices, its batches, and evaluation.

Nothing here writes a file, or knows checkpoints or other runs.
"""
