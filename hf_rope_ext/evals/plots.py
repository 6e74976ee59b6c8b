"""Plots of a report; needs matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from hf_rope_ext.evals.report import Report


def plot_by_length(report: "Report", task: str, path: Path) -> None:
    """Draw one line per method over lengths, with the trained length marked."""
    from hf_rope_ext.evals.report import TITLES

    lengths = report.settings["lengths"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in report.settings["methods"]:
        values = [report.value(method, task, length) for length in lengths]
        axes.plot(lengths, values, marker="o", label=method)
    axes.axvline(report.settings["model"]["trained_length"], color="gray", linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    if task == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("context length in tokens (dashed: trained length)")
    axes.set_title(TITLES[task])
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_curves(curves: dict[str, Any], path: Path) -> None:
    """Draw wavelengths over pairs, and the bound on attention over distance, a line per method.

    Args:
        curves: What `hf_rope_ext.planning.curves` returns.
        path: The PNG to write.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, curve in curves["methods"].items():
        lengths = [one if one is not None else float("nan") for one in curve["wavelengths"]]
        left.plot(range(len(lengths)), lengths, marker=".", label=label)
        right.plot(curves["distances"], curve["decay"], label=label)
    left.set_yscale("log")
    left.axhline(curves["trained_length"], color="gray", linestyle="--")
    left.set_xlabel("pair, fast to slow (dashed: trained length)")
    left.set_title("positions per turn")
    left.legend()
    right.set_xscale("log")
    right.axvline(curves["trained_length"], color="gray", linestyle="--")
    right.set_xlabel("distance in positions (dashed: trained length)")
    right.set_title("bound on attention, share of that at distance 0")
    right.legend()
    figure.savefig(path, dpi=120)
