"""transformers' Trainer for a patched model: its checkpoints remember their RoPE."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from hf_rope_ext.finetune.callback import Evaluation
from hf_rope_ext.finetune.pose import PositionSkips
from hf_rope_ext.saving.adapters import save_record, weights_record

STATE = "trainer_state.json"
"""The file that Trainer writes last in a checkpoint."""


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints hold the RoPE record, and which evaluates by length.

    Args:
        *args: As for Trainer.
        evaluation: What `evaluate` measures; Trainer's own evaluation if not given.
        skips: What moves positions inside the rotary embeddings by a batch's
            ``position_offsets``.
        **kwargs: As for Trainer.
    """

    control: Any

    def __init__(
        self,
        *args: Any,
        evaluation: Evaluation | None = None,
        skips: PositionSkips | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.evaluation = evaluation
        self.skips = skips
        # sharded weights cannot be read any more when the first checkpoint is written
        self.base_weights = weights_record(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside an adapter the record of the patch under it."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            save_record(self.model, output_dir or self.args.output_dir, self.base_weights)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """Return the loss of a batch, at its own positions."""
        offsets: Tensor | None = inputs.pop("position_offsets", None)
        if self.skips is not None:
            self.skips.set(offsets)
        return super().compute_loss(model, inputs, *args, **kw)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return perplexity and pass key retrieval by length, and log them."""
        if self.evaluation is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        if self.skips is not None:
            self.skips.set(None)
        with self.compute_loss_context_manager():
            measured = self.evaluation.measure(self.model)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class RememberRope(TrainerCallback):  # type: ignore[misc]
    """Gives any other Trainer's checkpoints the RoPE record: ``trainer.add_callback(...)``."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        """Write the record into the checkpoint that was just saved."""
        if state.is_world_process_zero:
            save_record(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def last_checkpoint(directory: Path) -> Path | None:
    """Return the last checkpoint that was written to its end, None where there is none.

    A run that was killed while it saved leaves one without its state, or with half of it.
    """
    found = [
        path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()
    ]
    for path in sorted(found, key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            TrainerState.load_from_json(str(path / STATE))
        except (OSError, ValueError, TypeError):
            continue
        return path
    return None
