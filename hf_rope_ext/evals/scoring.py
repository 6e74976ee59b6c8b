"""Score given tokens in one forward pass, without materializing the logits of all positions.

The logits of a sequence take length x vocabulary numbers: 74 GiB for 128k tokens and a vocabulary
of 150k. Here hidden states are computed once, and the model's own ``forward`` turns them into
logits a few positions at a time, so that any model-specific processing of logits still applies.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = 1 << 23
"""Maximum number of logits per chunk: 32 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Scores:
    """A model's scores of given tokens.

    Args:
        log_probs: Natural log-probabilities, float64, on the CPU.
        greedy: Whether each token is the most likely one, bool, on the CPU.
    """

    log_probs: Tensor
    greedy: Tensor


def score_last(
    model: nn.Module, input_ids: Tensor, targets: int, chunk: int | None = None, **inputs: Any
) -> Scores:
    """Return the scores of the last tokens of each row, ``(batch, targets)``.

    Args:
        model: A causal language model.
        input_ids: ``(batch, seq)``.
        targets: Number of tokens at the end of each row to score, less than ``seq``.
        chunk: As in `score_tokens`.
        **inputs: As in `score_tokens`.
    """
    batch, length = input_ids.shape
    positions = torch.arange(length - targets - 1, length - 1)
    where = torch.cartesian_prod(torch.arange(batch), positions)
    wanted = input_ids[:, -targets:].flatten()
    scores = score_tokens(model, input_ids, where, wanted, chunk=chunk, **inputs)
    return Scores(scores.log_probs.view(batch, targets), scores.greedy.view(batch, targets))


@torch.inference_mode()
def score_tokens(
    model: nn.Module,
    input_ids: Tensor,
    where: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
    **inputs: Any,
) -> Scores:
    """Return the scores of tokens, each following a given position, ``(targets,)``.

    Args:
        model: A causal language model, or a wrapper such as a PEFT model.
        input_ids: ``(batch, seq)``; rows may be padded at the end.
        where: Row and position that each target follows, ``(targets, 2)``.
        targets: Token ids, ``(targets,)``.
        chunk: Number of positions per chunk of logits; None to derive it from the vocabulary size.
        dtype: Dtype of the softmax.
        **inputs: Further inputs of the model, such as images.
    """
    ids = input_ids.to(next(model.parameters()).device)
    pieces = [
        _score_logits(logits.to(dtype), targets[start : start + len(logits)].to(logits.device))
        for start, logits in _logits(model, ids, where, chunk, inputs)
    ]
    log_probs, greedy = zip(*pieces, strict=True)
    return Scores(torch.cat(log_probs), torch.cat(greedy))


def keeps_logits(model: nn.Module) -> bool:
    """Return whether a model can compute the logits of the last positions only."""
    return "logits_to_keep" in inspect.signature(type(_causal(model)).forward).parameters


def _score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and whether each is the largest, on the CPU."""
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    # log_softmax would allocate another tensor the size of the logits
    log_probs = chosen.double() - logits.logsumexp(dim=-1).double()
    return log_probs.cpu(), (logits.argmax(dim=-1) == targets).cpu()


def _logits(
    model: nn.Module, ids: Tensor, where: Tensor, chunk: int | None, inputs: dict[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of the first position of a chunk, and its logits, ``(chunk, vocabulary)``."""
    rows, positions = where.unbind(dim=1)
    if not keeps_logits(model):
        yield 0, model(input_ids=ids, use_cache=False, **inputs).logits[rows, positions]
        return
    causal = _causal(model)
    first = int(positions.min())
    kept = ids.shape[1] - first
    size = chunk or _chunk(causal)
    decoded = _decode(model, causal, ids, inputs) if kept * len(ids) > size else None
    if decoded is None:
        output = model(input_ids=ids, use_cache=False, logits_to_keep=kept, **inputs)
        yield 0, output.logits[rows, positions - first]
        return
    hidden = decoded[1].last_hidden_state
    for start in range(0, len(where), size):
        part = slice(start, start + size)
        decoded[1].last_hidden_state = hidden[rows[part], positions[part]][None]
        yield start, _head(causal, *decoded, ids)


def _chunk(causal: Any) -> int:
    config = getattr(causal, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 1
    return int(max(LOGITS_AT_ONCE // vocabulary, 16))


def _decode(
    model: nn.Module, causal: Any, ids: Tensor, inputs: dict[str, Any]
) -> tuple[nn.Module, Any] | None:
    """Run a model; return the submodule that feeds its head, and that submodule's output.

    None if no submodule returns hidden states.
    """
    outputs: list[tuple[nn.Module, Any]] = []

    def keep(part: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.shape[:2] == ids.shape:
            outputs.append((part, output))

    handles = [part.register_forward_hook(keep) for part in causal.children()]
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs[-1] if outputs else None


def _head(causal: Any, decoder: nn.Module, output: Any, ids: Tensor) -> Tensor:
    """Return the logits that a model makes of its decoder's output, ``(chunk, vocabulary)``."""
    stand_in = _WithDecoded(causal, decoder, output)
    output = type(causal).forward(stand_in, input_ids=ids, use_cache=False)
    return output.logits[0]  # type: ignore[no-any-return]


class _WithDecoded:
    """Stands in for ``self`` in a model's forward: the model, except that its decoder has run."""

    def __init__(self, causal: nn.Module, decoder: nn.Module, output: Any) -> None:
        # attribute names that no model uses
        self.__dict__.update(_model=causal, _replaced=decoder, _decoded=output)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        return _Decoder(value, self._decoded) if value is self._replaced else value


class _Decoder:
    """Stands in for a decoder that has already run: calling it returns its output."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        self.__dict__.update(_replaced=decoder, _decoded=output)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)


def _causal(model: nn.Module) -> Any:
    """Return the outermost transformers model inside a module."""
    return next((part for part in model.modules() if isinstance(part, _pretrained())), model)


def _pretrained() -> type[nn.Module]:
    from transformers import PreTrainedModel

    return PreTrainedModel  # type: ignore[no-any-return]
