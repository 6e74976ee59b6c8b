"""The progress bar, log file and plot of a fine-tune."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

LOG = "log.jsonl"
CURVE = "curve.png"


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar with loss and tokens per second, and without printed logs.

    Args:
        tokens_per_step: Tokens per step, over all devices.
    """

    def __init__(self, tokens_per_step: int) -> None:
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.postfix: dict[str, str] = {}
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the speed of the step."""
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            seconds = max(time.perf_counter() - self.start, 1e-9)
            self.postfix["tokens/s"] = f"{self.tokens_per_step / seconds:,.0f}"
            self.training_bar.set_postfix(self.postfix, refresh=False)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.postfix["loss"] = f"{float(logs['loss']):.4f}"
            self.training_bar.set_postfix(self.postfix)


class Journal(TrainerCallback):  # type: ignore[misc]
    """A file with all log entries, one JSON object per line.

    A resumed run first drops the entries logged after its checkpoint.

    Args:
        directory: Where to write the file.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the entries logged up to the checkpoint."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the last entry."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def plot_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, and perplexity and passkey accuracy by length, over steps.

    Args:
        history: A trainer's ``log_history``.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    names = sorted(
        {name for entry in history for name in entry if name.startswith("eval_")},
        key=lambda name: int(name.rpartition("_")[2]) if name[-1].isdigit() else -1,
    )
    tasks = [
        task
        for task in ("perplexity", "passkey")
        if any(name.startswith(f"eval_{task}_") for name in names)
    ]
    figure = Figure(figsize=(5 * (1 + len(tasks)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if losses:
        axes[0].plot(*zip(*losses, strict=True))
    axes[0].set_title("training loss")
    for panel, task in zip(axes[1:], tasks, strict=True):
        for name in names:
            if name.startswith(f"eval_{task}_"):
                points = [(entry["step"], entry[name]) for entry in history if name in entry]
                panel.plot(*zip(*points, strict=True), marker="o", label=name.rpartition("_")[2])
        panel.set_title(f"{task} by length in tokens")
        panel.legend()
    if "perplexity" in tasks:
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
    for panel in axes:
        panel.set_xlabel("step")
    figure.savefig(path, dpi=120)
