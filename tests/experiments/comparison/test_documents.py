"""The tables and the plot in docs/, from made-up results."""

import dataclasses

from experiments.comparison import documents, results
from experiments.comparison.results import DIVERGED
from tests.experiments.comparison.made_up import (
    SAM,
    SGD,
    SGD_LONGER,
    TASK,
    comparison_of,
    eight,
)


def test_accuracies():
    worse, like_sgd = eight("asam", 0.4, rho=1.0), eight("gsam", 0.5, rho=0.1)
    known = comparison_of(SAM, SGD, SGD_LONGER, worse, like_sgd)
    lines = documents.test_accuracies([known]).splitlines()
    assert lines[0].startswith("**digits, mlp, batch 32**: test accuracy in %")
    assert lines[0].endswith("over 8 seeds")
    assert lines[2:9] == [
        "| method | epochs | clean labels |",
        "| --- | ---: | --- |",
        "| sgd | 10 | 50.88 ± 0.30 |",
        "| sgd | 20 | 60.87 ± 0.30 |",
        "| sam | 10 | **70.88 ± 0.30** † (rho 0.1) |",
        "| asam | 10 | *40.88 ± 0.30* ‡ (rho 1) |",
        "| gsam | 10 | 50.88 ± 0.30 ‡ (rho 0.1) |",
    ]
    assert "the command" in lines


def test_differences():
    """Of the three questions, sgd has an answer to none, and SAM to the first two."""
    asam = eight("asam", 0.72, rho=1.0)
    text = documents.differences_in_points([comparison_of(SAM, SGD, SGD_LONGER, asam)])
    same_epochs, same_gradients, against_sam = text.split("**digits, mlp, batch 32**: ")[1:]
    assert same_epochs.startswith("against sgd for as many epochs\n\n| method | clean labels |")
    assert "| sam | **+20.00** [+20.00, +20.00] |" in same_epochs
    assert "| sam | **+10.00** [+10.00, +10.00] |" in same_gradients
    assert "| sgd" not in same_epochs + same_gradients
    assert "| asam | **+2.00** [+2.00, +2.00] |" in against_sam
    assert "| sam |" not in against_sam
    assert "```sh\nthe command\n```" in text
    assert "against SAM" not in documents.differences_in_points([comparison_of(SGD, SGD_LONGER)])


def test_radii():
    """Where several hyperparameters vary, the others have the values that were chosen."""
    groups = [SGD]
    for rho, mu, accuracy in ((0.1, 1, 0.5), (0.2, 1, 0.6), (0.1, 2, 0.7), (0.2, 2, 0.4)):
        groups.append(eight("bisam-log", accuracy, spread=0, rho=rho, mu=float(mu)))
    first, *others = eight("bisam-log", 0.9, rho=0.4, mu=2.0)
    groups.append([dataclasses.replace(first, status=DIVERGED), *others])
    text = documents.validation_accuracies([comparison_of(*groups)])
    assert "| rho | 0.1 | 0.2 | 0.4 |" in text
    assert "| bisam-log | **70.00** | 40.00 | diverged |" in text


def test_only_what_is_marked_is_rewritten(tmp_path):
    there = {"digits-noise-more": 0.4, "digits-noise-less": 0.2, "mu-search": 0.9}
    there |= {"study-digits-noise-0.8": 0.8, "study-digits-0.6": 0.6}
    for name, noise in there.items():
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        known = comparison_of(SGD, SAM, task=TASK | {"label_noise": noise}, command=name)
        results.write_merged(folder, [known])
    (tmp_path / "docs").mkdir()
    paths = [tmp_path / "docs" / name for name in ("results.md", "comparing.md", "pays.md")]
    for path in paths:
        path.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    updated = documents.updated(tmp_path)
    plot, *rest = updated
    assert plot == tmp_path / "docs" / "wrong-labels.svg"
    assert rest == paths
    for text in map(updated.get, paths):
        assert text.startswith("before\n<!-- results -->\n")
        assert text.endswith("<!-- end of results -->\nafter\n")
        assert "old" not in text
    tables = updated[paths[0]]
    assert "| method | epochs | 20 % wrong labels | 40 % wrong labels |" in tables
    assert "```sh\ndigits-noise-less\ndigits-noise-more\n```" in tables
    study = updated[paths[2]]
    assert "| method | 60 % wrong labels | 80 % wrong labels |" in study
    assert "```sh\nstudy-digits-0.6\nstudy-digits-noise-0.8\n```" in study


def test_the_plot_has_the_accuracies_at_every_share(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        documents.plots, "over_label_noise", lambda lines: drawn.update(lines) or ""
    )
    other = comparison_of(SGD, task=TASK | {"batch_size": 64})
    shares = [comparison_of(SGD, SAM, task=TASK | {"label_noise": noise}) for noise in (0.2, 0.4)]
    documents.wrong_labels([comparison_of(SAM, eight("gsam", 0.9, rho=0.1)), other, *shares])
    assert {name: list(line) for name, line in drawn.items()} == {
        "sam": [0.0, 0.2, 0.4],
        "sgd": [0.2, 0.4],
    }
    assert drawn["sam"][0.4].mean == sum(r.test_accuracy for r in SAM) / 8
