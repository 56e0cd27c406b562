"""The machine underneath: files, command lines, signals, processes, memory, progress bars.

Nothing here knows what is trained. A module of this room imports no other room.
"""
