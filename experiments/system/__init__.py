"""The machine: files, command lines, signals, processes, memory, progress bars.

Nothing here knows what is trained, or imports another room.
"""
