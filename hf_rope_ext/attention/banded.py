"""The attention that a model with an attention-side method computes, as transformers calls it."""

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.attention.kernels import attend
from hf_rope_ext.attention.view import Bound, Part, View, view_of
from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host
from hf_rope_ext.rotary.running import RUNNING, innermost

NAME = "hf_rope_bands"
"""Under which transformers knows the attention and its mask."""

BOUND = "_hf_rope_bound"
"""Attribute of an attention module with its part of the patch."""


class _Observed(threading.local):
    """Whether the attention only notes what it gets, and what that was."""

    notes: dict[Hashable, Tensor] | None = None
    poisoned = False


OBSERVED = _Observed()


@contextmanager
def observing() -> Iterator[dict[Hashable, Tensor]]:
    """Note queries and keys of single tokens instead of attending, for a ``with`` block."""
    OBSERVED.notes = {}
    try:
        yield OBSERVED.notes
    finally:
        OBSERVED.notes = None


@contextmanager
def poisoned() -> Iterator[None]:
    """Let the banded attention return NaN for a ``with`` block."""
    OBSERVED.poisoned = True
    try:
        yield
    finally:
        OBSERVED.poisoned = False


def banded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in the bands of the module's method; an attention of transformers.

    Modules without a method of their own (no rotation, a sliding window) attend as ever.

    Args:
        module: The attention module.
        query: ``(batch, heads, queries, head_dim)``, rotated to their positions.
        key: ``(batch, kv_heads, keys, head_dim)``, rotated to theirs.
        value: ``(batch, kv_heads, keys, value_dim)``.
        attention_mask: As in `View`; None for plain causal.
        dropout: Of the attention weights.
        scaling: Of the scores; one over the root of ``head_dim`` by default.
        softcap: Soft cap of the scores.
        s_aux: Scores of the model's own sinks, ``(heads,)``.
        **kwargs: What else transformers passes.

    Returns:
        ``(batch, queries, heads, value_dim)`` and None.

    Raises:
        RopeError: If the positions of the keys are not known, or the call asks for what bands
            have not.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if OBSERVED.notes is not None:
        return _note(module, query, key, value, **kwargs), None
    bound: Bound | None = getattr(module, BOUND, None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if bound is None:
        follows = attention_mask is None and query.shape[2] not in (1, key.shape[2])
        is_stock = softcap is None and s_aux is None and not follows
        if is_stock and (attention_mask is None or attention_mask.ndim == 4):
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        view = _plain_view(module, query, key.shape[2], attention_mask)
    else:
        _require_served(module, bound, kwargs)
        call: Any = innermost(RUNNING.call, bound.rotary.planner)
        view = view_of(bound, call, attention_mask, key.shape[2], query.shape[1])
    out = attend(
        view, query, key, value, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux
    )
    if OBSERVED.poisoned and bound is not None:
        out = out * torch.nan
    return out.transpose(1, 2).contiguous(), None


def _note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """Note the queries and keys of single tokens, which see themselves alone; return values."""
    from transformers.integrations.sdpa_attention import repeat_kv

    assert OBSERVED.notes is not None
    if kwargs.get("sliding_window") is None and query.shape[2] == 1:
        for name, states in (("query", query), ("key", key)):
            OBSERVED.notes[module, name] = states.reshape(-1, states.shape[-1]).float().cpu()
    own = value[:, :, -1:]
    out: Tensor = repeat_kv(own, query.shape[1] // own.shape[1])
    return out.transpose(1, 2)


def _require_served(module: nn.Module, bound: Bound, asked: Mapping[str, Any]) -> None:
    """Check that a call can be served by bands.

    Raises:
        RopeError: If it asks for the weights or for later tokens, or comes from outside its model.
    """
    if asked.get("output_attentions"):
        raise RopeError(
            "output_attentions: the attention of a method that changes it is computed in blocks "
            "and keeps no weights; unpatch the model to look at them."
        )
    if asked.get("is_causal") is False:
        raise RopeError(
            "is_causal=False: distances are back from a query, and there are none to later tokens; "
            "unpatch the model, or patch it with a method that changes frequencies."
        )
    if innermost(RUNNING.call, bound.rotary.planner) is None:
        raise RopeError(
            f"{type(module).__name__} was called outside its text model, so the positions of its "
            f"tokens are not known; call the model."
        )


def banded_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of `banded_attention`: which slots hold tokens, where that says it all.

    A mask of all queries and keys would take memory that grows with the square of the length.

    Args:
        batch_size: Number of rows.
        q_length: Number of queries.
        kv_length: Number of keys.
        q_offset: Slot of the first query.
        kv_offset: Slot of the first key.
        mask_function: The pattern.
        attention_mask: Which slots hold tokens, ``(batch, slots)``, if padding is known.
        local_size: Size of a sliding window or chunk.
        allow_is_causal_skip: Whether the pattern is plain causal.
        **kwargs: What else transformers passes.

    Returns:
        None for causal without padding; ``(batch, keys)`` with it; else as SDPA's.
    """
    is_plain = host.is_plain_causal(mask_function) and local_size is None
    if is_plain and allow_is_causal_skip and not kv_offset:
        if attention_mask is None:
            return None
        held = attention_mask[:, :kv_length].bool()
        missing = kv_length - held.shape[1]
        held = torch.nn.functional.pad(held, (0, missing))
        if missing or torch.compiler.is_compiling():
            return held
        return None if bool(held.all()) else held
    return host.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _plain_view(module: nn.Module, query: Tensor, tokens: int, mask: Tensor | None) -> View:
    """Return one band of everything, for modules without a method."""
    count = query.shape[2]
    call = RUNNING.call
    before = tokens - count if call is None or call.slots is None else call.seen
    own = (torch.arange(count, device=query.device) + before)[None]
    causal = getattr(module, "is_causal", True) and (mask is None or mask.ndim == 2)
    high = own + 1 if causal else torch.full_like(own, tokens)
    slots = torch.arange(tokens, device=query.device, dtype=torch.float64)[None]
    part = Part(torch.zeros_like(high), high)
    return View([part], mask, None, None, own.double(), slots)
