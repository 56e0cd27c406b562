"""Commands that time steps or count what they need of devices.

No other room imports them, and no training depends on them.
"""
