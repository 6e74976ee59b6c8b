"""Plots of a report; needs matplotlib."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_rope_ext.evals.report import Report


def plot_by_length(report: Report, task: str, path: Path) -> None:
    """Plot one line per method over length, marking the trained length."""
    lengths = report.lengths(task)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(report.methods):
        points = report.scores(method, task)
        color = f"C{number}"
        axes.plot(list(points), list(points.values()), marker="o", label=method, color=color)
        if report.is_score(task):
            cells = [cell for n in points if (cell := report.cell(method, task, n)) is not None]
            low, high = ([float(cell[end]) for cell in cells] for end in ("low", "high"))
            axes.fill_between(list(points), low, high, alpha=0.1, color=color, linewidth=0)
    if report.trained:
        axes.axvline(report.trained, color="gray", linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    if report.is_score(task):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    elif any(report.scores(method, task) for method in report.methods):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("context length in tokens (dashed: trained length)")
    axes.set_title(report.title(task))
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_by_depth(report: Report, task: str, path: Path) -> None:
    """Plot a heat map per method: score over length and depth."""
    lengths, depths = report.lengths(task), report.depths(task)
    count = len(report.methods)
    figure = Figure(figsize=(max(2.6 * count, 4.5), 3.4), layout="constrained")
    image: Any = None
    for axes, method in zip(
        figure.subplots(1, count, squeeze=False)[0], report.methods, strict=True
    ):
        parts = [[report.at_depth(method, task, n, depth) for n in lengths] for depth in depths]
        grid = [[float("nan") if part is None else part["score"] for part in row] for row in parts]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [report.multiple(n) or str(n) for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        edge = sum(length <= report.trained for length in lengths)
        axes.axvline(edge - 0.5, color="black", linestyle="--")
        axes.set_title(method)
    figure.suptitle(f"{task}: score by depth and length (dashed: trained length {report.trained})")
    figure.colorbar(image, ax=figure.axes, format=lambda share, _: f"{share:.0%}")
    figure.savefig(path, dpi=120)


def plot_curves(curves: dict[str, Any], path: Path) -> None:
    """Plot wavelengths by pair and the bound on attention by distance, one line per method.

    Args:
        curves: Result of `hf_rope_ext.planning.extension.curves`.
        path: File to write, PNG without a suffix.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, curve in curves["methods"].items():
        lengths = [float("nan") if n is None else n for n in curve["wavelengths"]]
        left.plot(range(len(lengths)), lengths, marker=".", label=label)
        right.plot(curves["distances"], curve["decay"], label=label)
    left.set_yscale("log")
    left.axhline(curves["trained_length"], color="gray", linestyle="--")
    left.set_xlabel("pair, fast to slow (dashed: trained length)")
    left.set_title("wavelength in positions")
    left.legend()
    right.set_xscale("log")
    right.axvline(curves["trained_length"], color="gray", linestyle="--")
    right.set_xlabel("distance in positions (dashed: trained length)")
    right.set_title("bound on attention, relative to distance 0")
    right.legend()
    figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")
