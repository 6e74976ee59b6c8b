"""Perplexity by length and pass key retrieval of a model that is being trained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.compare import TOKENS_AT_ONCE
from hf_rope_ext.evals.perplexity import PerplexityTask
from hf_rope_ext.evals.text_passkey import PasskeyTask


@dataclass(frozen=True)
class Evaluation:
    """What is measured at the start, during and at the end of a fine-tune.

    Args:
        tasks: Perplexity, and pass keys if wanted.
        lengths: In tokens, ascending.
    """

    tasks: tuple[PerplexityTask | PasskeyTask, ...]
    lengths: tuple[int, ...]

    @classmethod
    def on(
        cls,
        tokens: Tensor,
        tokenizer: Any,
        lengths: tuple[int, ...],
        *,
        windows: int = 16,
        targets: int = 64,
        passkeys: int = 20,
        seed: int = 0,
    ) -> "Evaluation":
        """Return the evaluation on held-out text.

        Args:
            tokens: The text, ``(tokens,)``.
            tokenizer: The model's tokenizer.
            lengths: In tokens, ascending.
            windows: Places where perplexity is measured.
            targets: Tokens scored at each.
            passkeys: Pass keys per length; 0 for none.
            seed: Of the pass keys.

        Raises:
            RopeError: If the text is shorter than the longest length, or a length has no room for
                what is measured.
        """
        if min(lengths) <= targets + 1:
            raise RopeError(
                f"eval_lengths: {min(lengths)} tokens leave no context before eval_targets="
                f"{targets} scored ones; give longer lengths or fewer targets."
            )
        start = tokenizer.bos_token_id
        prefix = () if start is None else (int(start),)
        tasks: list[PerplexityTask | PasskeyTask] = [
            PerplexityTask(tokens, max(lengths), windows, targets, prefix)
        ]
        if passkeys:
            hidden = PasskeyTask(tokenizer, tokens, max(lengths), passkeys, seed, prefix)
            hidden.sample(min(lengths), 0)  # raises where there is no room
            tasks.append(hidden)
        return cls(tuple(tasks), lengths)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return perplexity and share of pass keys, as ``perplexity_512`` and ``passkey_512``."""
        training = model.training
        model.eval()
        plain = _NoInferenceMode(model)
        found = {}
        for length in self.lengths:
            size = max(TOKENS_AT_ONCE // length, 1)
            for task in self.tasks:
                numbers = task.measure(plain, length, size, lambda samples: None)
                found[f"{task.name}_{length}"] = float(numbers[task.metric])
        model.train(training)
        return found


class _NoInferenceMode(nn.Module):
    """Calls a model outside of torch's inference mode.

    Weights that FSDP gathers in that mode could not be used in training afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        with torch.inference_mode(False), torch.no_grad():
            return self.model(*args, **kwargs)
