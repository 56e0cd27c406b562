"""What a comparison will train, and whether it can show anything."""

from collections.abc import Sequence

from experiments.comparison.significance import LEVEL, smallest_p_value
from experiments.config.methods import PLAIN
from experiments.config.recipe import Recipe


def in_words(
    recipes: Sequence[Recipe], baseline: str, steps_per_epoch: int, confirm: int = 0
) -> str:
    """Says how many runs there are, and whether their seeds can make a difference significant.

    Args:
        recipes: all runs whose values are known.
        baseline: label of the method that the others are compared with.
        steps_per_epoch: number of steps per epoch.
        confirm: number of fresh seeds that each method's chosen values then get.
    """
    seeds = len({recipe.seed for recipe in recipes})
    steps = [recipe.epochs * steps_per_epoch for recipe in recipes]
    gradients = sum(r.gradients_per_step(n) * n for r, n in zip(recipes, steps, strict=True))
    labels = dict.fromkeys(recipe.label for recipe in recipes)
    lines = [
        f"{len(recipes)} runs of {', '.join(labels)}; {seeds} {'seed' if seeds == 1 else 'seeds'}; "
        f"{gradients:,.0f} batch gradients"
    ]
    if confirm:
        rows = len({recipe.key[:2] for recipe in recipes})
        fresh = f"{confirm} fresh {'seed' if confirm == 1 else 'seeds'}"
        lines.append(f"then {rows * confirm} runs of the chosen values; {fresh}")
        seeds = confirm
    count = _comparisons(recipes, baseline, steps_per_epoch)
    smallest = smallest_p_value(seeds, count)
    if count and smallest > 1 - LEVEL:
        enough = next(n for n in range(2, 64) if smallest_p_value(n, count) <= 1 - LEVEL)
        option = "--confirm" if confirm else "--seeds"
        lines.append(
            f"too few seeds to show a difference: with {seeds} seeds and {count} comparisons, no "
            f"p-value can be below {smallest:.2g}. {option} {enough} is enough"
        )
    elif count:
        lines.append(
            f"{seeds} seeds can show a difference: with {count} comparisons, the smallest p-value "
            f"is {smallest:.2g}, and {1 - LEVEL:.2g} is significant"
        )
    return "\n".join(lines)


def _comparisons(recipes: Sequence[Recipe], baseline: str, steps_per_epoch: int) -> int:
    """Returns the number of differences that the table will have."""
    rows = {(r.label, r.epochs): r.gradients_per_step(r.epochs * steps_per_epoch) for r in recipes}
    count = 0
    for (label, epochs), gradients in rows.items():
        count += label != baseline and (baseline, epochs) in rows
        count += gradients > 1 and (PLAIN, round(epochs * gradients)) in rows
    return count
