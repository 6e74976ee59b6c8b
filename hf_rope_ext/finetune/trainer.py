"""transformers' Trainer for a patched model, with the RoPE record in its checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_rope_ext.finetune.evaluation import Evaluation
from hf_rope_ext.finetune.pose import PositionSkips
from hf_rope_ext.patching.adapter_record import (
    ADAPTER_RECORD,
    remember_weights,
    save_record,
)


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that evaluates by length, at a batch's own positions.

    Args:
        *args: As for Trainer.
        evaluation: What `evaluate` measures; Trainer's own evaluation by default.
        skips: Applies a batch's ``position_offsets`` inside the rotary embeddings.
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
        # once sharded, the weights can no longer be read for the record
        remember_weights(self.model)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """Return the loss of a batch at its own positions."""
        offsets: Tensor | None = inputs.pop("position_offsets", None)
        if self.skips is not None:
            self.skips.set(offsets)
        return super().compute_loss(model, inputs, *args, **kw)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, log and return perplexity and passkey accuracy by length."""
        if self.evaluation is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        if self.skips is not None:
            self.skips.set(None)
        with self.compute_loss_context_manager():
            scores = self.evaluation.measure(self.model)
        metrics = {f"eval_{name}": score for name, score in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class RememberRope(TrainerCallback):  # type: ignore[misc]
    """A callback that writes the RoPE record where no ``save_pretrained`` has written it."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        """Write the record into the checkpoint just saved, unless it is there."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (checkpoint / ADAPTER_RECORD).exists():
            save_record(model, checkpoint)
