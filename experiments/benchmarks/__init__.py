"""Commands that time steps or count what they ask of devices; each is one file.

Nobody imports them, and no training depends on them.
"""
