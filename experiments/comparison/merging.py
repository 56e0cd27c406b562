"""Joins results of several folders to one comparison per task."""

import json
from collections.abc import Iterable, Sequence

from experiments.comparison.results import Comparison, Result
from experiments.system.command_line import ArgumentError


def merged(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Returns one comparison per task.

    Raises:
        ArgumentError: if two results of one run differ, or a seed both chooses and confirms.
    """
    by_task: dict[str, Comparison] = {}
    for comparison in comparisons:
        name = json.dumps(comparison.task, sort_keys=True)
        whole = by_task.setdefault(name, Comparison(comparison.task, [], []))
        known = {result.key: result for result in whole.results}
        for result in comparison.results:
            there = known.get(result.key)
            if there is None:
                whole.results.append(result)
            elif there.confirms != result.confirms:
                raise _both(result)
            elif there.test_accuracy != result.test_accuracy:
                raise ArgumentError(
                    f"--from has two results of {result.method} with seed {result.seed} that "
                    "differ: leave one of their folders out"
                )
        _check_disjoint(whole.results)
        whole.origins += comparison.origins
    return list(by_task.values())


def _check_disjoint(results: Sequence[Result]) -> None:
    """Refuses seeds of which some runs have chosen values that others confirm."""
    choosing = {(result.method, result.seed) for result in results if not result.confirms}
    for result in results:
        if result.confirms and (result.method, result.seed) in choosing:
            raise _both(result)


def _both(result: Result) -> ArgumentError:
    return ArgumentError(
        f"--from has seed {result.seed} of {result.method} among the seeds that choose values and "
        "among those that confirm them: leave one of their folders out"
    )
