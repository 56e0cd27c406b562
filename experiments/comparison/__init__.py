"""Many runs: the grid, replicas in one program, results on disk, statistics, the report.

Nothing here changes how a single run is trained.
"""
