"""One training run: its experiment, its loop, its checkpoints and its folder.

Nothing here knows other runs, or what is made of several runs.
"""
