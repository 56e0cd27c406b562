"""Attacks on runs and comparisons: random damage, kills, full disks.

`python -m tests.attacks` runs all of them. The tests run a few.
"""
