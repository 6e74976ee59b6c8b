"""Log-probabilities of given tokens, with the logits of only a few positions in memory.

Logits of a whole sequence take length x vocabulary numbers: 74 GiB for 128k tokens of a vocabulary
of 150k. Here the hidden states are made once, and the model's own ``forward`` makes logits of a few
positions at a time from them, so whatever a family does to its logits is done.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.evals.scoring import Scores

CHUNK = 256
"""Positions whose logits are in memory at a time."""


@torch.inference_mode()
def token_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    where: Tensor,
    targets: Tensor,
    *,
    chunk: int = CHUNK,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Score tokens, each after the input that ends at a place.

    Args:
        model: A causal language model, or one around it, such as a PEFT model.
        input_ids: ``(batch, seq)``, on the model's device. Padding may follow a row.
        where: Row and position after which each target stands, ``(targets, 2)``.
        targets: Token ids, ``(targets,)``.
        chunk: Positions whose logits are made at a time.
        dtype: The softmax is computed in.

    Returns:
        Scores of shape ``(targets,)``.
    """
    pieces = [
        _score(logits.to(dtype), targets[start : start + len(logits)].to(logits.device))
        for start, logits in _logits(model, input_ids, where, chunk)
    ]
    log_probs, greedy = zip(*pieces, strict=True)
    return Scores(torch.cat(log_probs), torch.cat(greedy))


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability and whether it is the largest, both on the CPU."""
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    found = chosen - logits.logsumexp(dim=-1)
    return found.double().cpu(), (logits.argmax(dim=-1) == targets).cpu()


def _logits(
    model: nn.Module, input_ids: Tensor, where: Tensor, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first place of a chunk, and its logits, ``(places, vocabulary)``."""
    causal = _causal(model)
    decoded = _decode(model, causal, input_ids) if _takes(causal, "logits_to_keep") else None
    if decoded is None:
        whole = model(input_ids, use_cache=False).logits
    else:
        hidden = decoded[1].last_hidden_state
    for start in range(0, len(where), chunk):
        rows, positions = where[start : start + chunk].unbind(dim=1)
        if decoded is None:
            yield start, whole[rows, positions]
        else:
            decoded[1].last_hidden_state = hidden[rows, positions][None]
            yield start, _head(causal, *decoded, input_ids)


def _decode(model: nn.Module, causal: Any, input_ids: Tensor) -> tuple[nn.Module, Any] | None:
    """Run a model and return the part of it whose hidden states its head reads, and its output.

    None where no part returns them as such.
    """
    found: list[tuple[nn.Module, Any]] = []

    def keep(part: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.shape[:2] == input_ids.shape:
            found.append((part, output))

    handles = [part.register_forward_hook(keep) for part in causal.children()]
    try:
        model(input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


def _head(causal: Any, decoder: nn.Module, output: Any, input_ids: Tensor) -> Tensor:
    """Return what the model's forward makes of its decoder's output, ``(places, vocabulary)``."""
    stand_in = _WithDecoded(causal, decoder, output)
    found = type(causal).forward(stand_in, input_ids=input_ids, use_cache=False)
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
    from transformers import PreTrainedModel

    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters
