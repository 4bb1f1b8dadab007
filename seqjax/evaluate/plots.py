"""Figures of evaluations, drawn without a display."""

from collections.abc import Mapping
from pathlib import Path

from seqjax.evaluate.perplexity import Perplexity


def plot_loss_by_position(
    results: Mapping[str, Perplexity], path: str | Path, *, window: int | None = None, title: str | None = None
) -> None:
    """Mean loss against the position in the document (log scale), one line per result, bands of two standard errors.

    Args:
        results: label -> result.
        path: image to write; its suffix gives the format.
        window: the window the model was trained with, drawn as a vertical line.
        title: of the figure.

    Raises:
        ValueError: no results.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("`results` is empty; expected at least one evaluation to draw")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, result in results.items():
        buckets = result.by_position
        # The geometric middle of [start, stop) of 1-based positions: position 0 has a place on a log axis too.
        middle = [((bucket.start + 1) * bucket.stop) ** 0.5 for bucket in buckets]
        mean = [bucket.nats_per_token for bucket in buckets]
        error = [2 * bucket.standard_error for bucket in buckets]
        (line,) = axes.plot(middle, mean, marker="o", markersize=3, label=label)
        low, high = [m - e for m, e in zip(mean, error)], [m + e for m, e in zip(mean, error)]
        axes.fill_between(middle, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if window is not None:
        axes.axvline(window, color="grey", linestyle="--", linewidth=1, label=f"training window ({window})")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the document, up to the predicted one")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    if title:
        axes.set_title(title)
    figure.savefig(path, dpi=130)
