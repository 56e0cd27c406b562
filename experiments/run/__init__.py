"""One training: what it computes with, its loop, its checkpoints and its folder.

Other runs, and what is made of several of them, are not known here.
"""
