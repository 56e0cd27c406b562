"""The comparison script in this process."""

from experiments import compare

SMALL = ["--epochs", 2, "--train-examples", 96, "--seeds", 2, "--label-noise", 0.3]
GRID = ["--methods", "sgd", "sam", "--rho", 0.05, 0.5, *SMALL]


def run(capsys, *args):
    """Exit status, standard output, standard error of the script in this process."""
    status = 0
    try:
        compare.main([str(arg) for arg in args])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
