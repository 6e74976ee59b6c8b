"""What a fine-tune shows while it runs and leaves behind: a bar, a log, a picture."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

LOG = "log.jsonl"
CURVE = "curve.png"


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' bar with loss and tokens per second; what it prints goes to the log instead.

    Args:
        tokens_per_step: Tokens of one step, over all devices.
    """

    def __init__(self, tokens_per_step: int) -> None:
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.shown: dict[str, str] = {}
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the speed of the step."""
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            took = max(time.perf_counter() - self.began, 1e-9)
            self.shown["tokens/s"] = f"{self.tokens_per_step / took:,.0f}"
            self.training_bar.set_postfix(self.shown, refresh=False)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the loss."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.shown["loss"] = f"{float(logs['loss']):.4f}"
            self.training_bar.set_postfix(self.shown)


class Journal(TrainerCallback):  # type: ignore[misc]
    """Everything that is logged, in a file, one JSON object a line.

    A resumed run first drops what was logged after the checkpoint it goes on from.

    Args:
        directory: Where to.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was logged up to the checkpoint."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(f"{json.dumps(one)}\n" for one in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was logged last."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def plot_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, and perplexity and pass keys by length, over steps.

    Args:
        history: A trainer's ``log_history``.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    measured = sorted(
        {name for entry in history for name in entry if name.startswith("eval_")},
        key=lambda name: int(name.rpartition("_")[2]) if name[-1].isdigit() else -1,
    )
    tasks = [
        task
        for task in ("perplexity", "passkey")
        if any(name.startswith(f"eval_{task}_") for name in measured)
    ]
    figure = Figure(figsize=(5 * (1 + len(tasks)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if losses:
        axes[0].plot(*zip(*losses, strict=True))
    axes[0].set_title("training loss")
    for place, task in zip(axes[1:], tasks, strict=True):
        for name in measured:
            if name.startswith(f"eval_{task}_"):
                points = [(entry["step"], entry[name]) for entry in history if name in entry]
                place.plot(*zip(*points, strict=True), marker="o", label=name.rpartition("_")[2])
        place.set_title(f"{task} by length in tokens")
        place.legend()
    if "perplexity" in tasks:
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
    for place in axes:
        place.set_xlabel("step")
    figure.savefig(path, dpi=120)
