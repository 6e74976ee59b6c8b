"""Evaluate perplexity and passkey retrieval by length during training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.compare import TOKENS_AT_ONCE
from hf_rope_ext.evals.measures import Measure, make_measure


@dataclass(frozen=True)
class Evaluation:
    """The tasks measured before, during and after a fine-tune.

    Args:
        measures: Perplexity, and optionally passkey retrieval, by name.
        lengths: Lengths to measure at, in tokens, ascending.
    """

    measures: dict[str, Measure]
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
            lengths: Lengths to measure at, in tokens, ascending.
            windows: Text windows over which perplexity is measured.
            targets: Tokens scored in each window.
            passkeys: Passkey prompts per length; 0 to skip the task.
            seed: Seed for the passkeys.

        Raises:
            RopeError: If the text is shorter than the longest length, or a length is too short for
                a task.
        """
        if min(lengths) <= targets + 1:
            raise RopeError(
                f"eval_lengths: {min(lengths)} tokens leave no context before the "
                f"eval_targets={targets} that are scored; use longer lengths or fewer targets."
            )
        bench = Bench(
            tokenizer,
            tokens,
            max(lengths),
            windows=windows,
            targets=targets,
            samples=passkeys,
            seed=seed,
        )
        names = ("perplexity", "passkey") if passkeys else ("perplexity",)
        measures = {name: make_measure(name, {}, bench) for name in names}
        for measure in measures.values():
            measure.check(lengths)
        return cls(measures, lengths)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return perplexity and passkey accuracy, as ``perplexity_512`` and ``passkey_512``."""
        plain = _NoInferenceMode(model)
        scores = {}
        with eval_mode(model):
            for length in self.lengths:
                size = max(TOKENS_AT_ONCE // length, 1)
                for name, measure in self.measures.items():
                    cell = measure.run(plain, length, size, lambda samples: None)
                    scores[f"{name}_{length}"] = float(cell[measure.metric])
        return scores


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a ``with`` block, then restore each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _NoInferenceMode(nn.Module):
    """Calls a model outside torch's inference mode.

    Weights that FSDP gathers in inference mode cannot be used in training afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        with torch.inference_mode(False), torch.no_grad():
            return self.model(*args, **kwargs)
