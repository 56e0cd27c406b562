"""The benchmark of many leaves, on few."""

from experiments.benchmarks import leaves
from tests.experiments.script import call


def test_every_step_is_compiled(capsys):
    args = ["--leaves", 2, 3, "--repeats", 1, "--methods", "gsam", "efficient"]
    status, out, err = call(leaves.main, capsys, *args)
    assert (status, err) == (0, "")
    rows = [line.rsplit(maxsplit=5) for line in out.splitlines() if line.count(".") >= 5]
    rows = [row for row in rows if len(row) == 6 and not row[0].startswith("bisam_jax")]
    names = ["by hand", "optax.contrib.sam, opaque", "gsam", "efficient"]
    assert [row[0] for row in rows] == 2 * names
    for _, trace, compiling, total, *_ in rows:
        assert abs(float(trace) + float(compiling) - float(total)) < 0.02


def test_bad_input_is_one_line(capsys):
    status, _, err = call(leaves.main, capsys, "--leaves", 0)
    assert status == 2
    assert "--leaves must be numbers at least 1" in err
