"""The learning curves of one run."""

import matplotlib.figure

from experiments.run.folder import RunFolder


def draw(folder: RunFolder, title: str, best_epoch: int | None) -> None:
    """Draws curves.png: both losses, validation accuracy and learning rate by epoch.

    Args:
        folder: its metrics are drawn; nothing is, if this process does not write or if no epoch
            is complete.
        title: what was trained.
        best_epoch: the epoch of the best checkpoint, which is marked.
    """
    if not folder.writes or not folder.metrics:
        return
    epochs = [row["epoch"] for row in folder.metrics]
    # Points where there is no line to see.
    style = {"marker": "o", "markersize": 3} if len(epochs) < 10 else {}

    def column(name: str) -> list[float]:
        return [row.get(name, float("nan")) for row in folder.metrics]

    figure = matplotlib.figure.Figure(figsize=(11, 3.2), layout="constrained")
    losses, accuracy, rate = figure.subplots(1, 3)
    losses.plot(epochs, column("loss"), color="black", label="training", **style)
    validation = column("validation_loss")
    losses.plot(epochs, validation, "--", color="#d55e00", label="validation", **style)
    losses.set(ylabel="loss")
    losses.legend()
    percent = [100 * value for value in column("validation_accuracy")]
    accuracy.plot(epochs, percent, color="black", **style)
    accuracy.set(ylabel="validation accuracy (%)")
    rate.plot(epochs, column("learning_rate"), color="black", **style)
    rate.set(ylabel="learning rate", ylim=(0, None))
    for axes in (losses, accuracy, rate):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="#0072b2", linestyle=":", zorder=0)
    if best_epoch is not None:
        best = percent[epochs.index(best_epoch)]
        accuracy.plot(best_epoch, best, "o", color="#0072b2", label=f"epoch {best_epoch}, the best")
        accuracy.legend()
    rho = folder.metrics[-1].get("rho")
    figure.suptitle(title if rho is None else f"{title}, rho {rho:g}")
    figure.savefig(folder.path / "curves.png", dpi=120)
