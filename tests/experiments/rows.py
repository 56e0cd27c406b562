"""CSV files as their rows."""

import csv


def read_csv(path):
    """The rows below the header of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
