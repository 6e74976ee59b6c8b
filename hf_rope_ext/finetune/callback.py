"""Perplexity by length and pass key retrieval of a model that is being trained."""

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
    """What is measured at the start, during and at the end of a fine-tune.

    Args:
        measures: Perplexity, and pass keys if requested, by name.
        lengths: In tokens, ascending.
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
        """Return perplexity and share of pass keys, as ``perplexity_512`` and ``passkey_512``."""
        training = model.training
        model.eval()
        plain = _NoInferenceMode(model)
        results = {}
        for length in self.lengths:
            size = max(TOKENS_AT_ONCE // length, 1)
            for name, measure in self.measures.items():
                numbers = measure.run(plain, length, size, lambda samples: None)
                results[f"{name}_{length}"] = float(numbers[measure.metric])
        model.train(training)
        return results


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
