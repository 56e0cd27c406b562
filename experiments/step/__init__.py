"""One training step: its state, its method, its devices, the batches that reach it, evaluation.

Everything here is a pure function or a compiled one. Nothing here writes a file or knows of epochs,
checkpoints or other runs.
"""
