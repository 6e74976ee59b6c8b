"""Score given tokens in one forward, without keeping the logits of all positions.

Logits of a whole sequence take length x vocabulary numbers: 74 GiB for 128k tokens of a vocabulary
of 150k. Here the hidden states are made once, and the model's own ``forward`` makes logits of a few
positions at a time from them, so whatever a family does to its logits is done.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = 1 << 23
"""Numbers in one piece of logits at most: 32 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Scores:
    """How a model rates given tokens.

    Args:
        log_probs: Natural log-probability of each, float64, on the CPU.
        greedy: Whether each is the most likely token, bool, on the CPU.
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
        targets: How many tokens at the end of each row are scored, less than ``seq``.
        chunk: As in `score_tokens`.
        **inputs: As in `score_tokens`.
    """
    batch, length = input_ids.shape
    places = torch.arange(length - targets - 1, length - 1)
    where = torch.cartesian_prod(torch.arange(batch), places)
    wanted = input_ids[:, -targets:].flatten()
    found = score_tokens(model, input_ids, where, wanted, chunk=chunk, **inputs)
    return Scores(found.log_probs.view(batch, targets), found.greedy.view(batch, targets))


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
    """Return the scores of tokens, each after the input that ends at a place, ``(targets,)``.

    Args:
        model: A causal language model, or one around it, such as a PEFT model.
        input_ids: ``(batch, seq)``. Padding may follow a row.
        where: Row and position after which each target stands, ``(targets, 2)``.
        targets: Token ids, ``(targets,)``.
        chunk: Positions whose logits are made at a time; chosen by the size of the vocabulary if
            not given.
        dtype: The softmax is computed in.
        **inputs: What else the model is called with, such as images.
    """
    ids = input_ids.to(next(model.parameters()).device)
    pieces = [
        _rated(logits.to(dtype), targets[start : start + len(logits)].to(logits.device))
        for start, logits in _logits(model, ids, where, chunk, inputs)
    ]
    log_probs, greedy = zip(*pieces, strict=True)
    return Scores(torch.cat(log_probs), torch.cat(greedy))


def keeps_logits(model: nn.Module) -> bool:
    """Return whether a model can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(type(_causal(model)).forward).parameters


def _rated(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability and whether it is the largest, both on the CPU."""
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    # log_softmax would be as large as the logits
    found = chosen.double() - logits.logsumexp(dim=-1).double()
    return found.cpu(), (logits.argmax(dim=-1) == targets).cpu()


def _logits(
    model: nn.Module, ids: Tensor, where: Tensor, chunk: int | None, inputs: dict[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first place of a piece, and its logits, ``(places, vocabulary)``."""
    rows, places = where.unbind(dim=1)
    if not keeps_logits(model):
        yield 0, model(input_ids=ids, use_cache=False, **inputs).logits[rows, places]
        return
    causal = _causal(model)
    first = int(places.min())
    kept = ids.shape[1] - first
    size = chunk or _chunk(causal)
    decoded = _decode(model, causal, ids, inputs) if kept * len(ids) > size else None
    if decoded is None:
        found = model(input_ids=ids, use_cache=False, logits_to_keep=kept, **inputs)
        yield 0, found.logits[rows, places - first]
        return
    hidden = decoded[1].last_hidden_state
    for start in range(0, len(where), size):
        piece = slice(start, start + size)
        decoded[1].last_hidden_state = hidden[rows[piece], places[piece]][None]
        yield start, _head(causal, *decoded, ids)


def _chunk(causal: Any) -> int:
    config = getattr(causal, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 1
    return int(max(LOGITS_AT_ONCE // vocabulary, 16))


def _decode(
    model: nn.Module, causal: Any, ids: Tensor, inputs: dict[str, Any]
) -> tuple[nn.Module, Any] | None:
    """Run a model and return the part of it whose hidden states its head reads, and its output.

    None where no part returns them as such.
    """
    found: list[tuple[nn.Module, Any]] = []

    def keep(part: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.shape[:2] == ids.shape:
            found.append((part, output))

    handles = [part.register_forward_hook(keep) for part in causal.children()]
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


def _head(causal: Any, decoder: nn.Module, output: Any, ids: Tensor) -> Tensor:
    """Return what the model's forward makes of its decoder's output, ``(places, vocabulary)``."""
    stand_in = _WithDecoded(causal, decoder, output)
    found = type(causal).forward(stand_in, input_ids=ids, use_cache=False)
    return found.logits[0]  # type: ignore[no-any-return]


class _WithDecoded:
    """What a model's forward takes for ``self``: its decoder is done, the rest is the model's."""

    def __init__(self, causal: nn.Module, decoder: nn.Module, output: Any) -> None:
        # under names that no model has
        self.__dict__.update(_undecoded=causal, _done=decoder, _decoded=output)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._undecoded, name)
        return _Done(found, self._decoded) if found is self._done else found


class _Done:
    """What stands for a decoder that has run: called, it returns its output again."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        self.__dict__.update(_done=decoder, _decoded=output)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._done, name)


def _causal(model: nn.Module) -> Any:
    """Return the transformers model inside, the outermost one."""
    return next((part for part in model.modules() if isinstance(part, _pretrained())), model)


def _pretrained() -> type[nn.Module]:
    from transformers import PreTrainedModel

    return PreTrainedModel  # type: ignore[no-any-return]
