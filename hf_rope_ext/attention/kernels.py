"""Attention over the bands of a `View` in blocks, so that memory grows with the length alone.

Each band is attended to on its own, by a kernel that also returns the logarithm of the sum of
exponentials of its scores, and the results are merged by it. Where a family needs what the kernel
has not (soft caps, sinks, biases, dropout), and in compiled code, the scores of a block of queries
are computed as they are written.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_rope_ext.attention.turning import Turn
from hf_rope_ext.attention.view import Piece, View

BLOCK = 512
"""Queries that are attended for at once by the kernel."""

SCORES_AT_ONCE = 2**24
"""The most scores that are held at once where they are written out."""


def attend(
    view: View,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of a call.

    Args:
        view: What its queries see.
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, kv_heads, keys, head_dim)``.
        value: ``(batch, kv_heads, keys, value_dim)``.
        scaling: Factor on all scores.
        dropout: Of the attention weights.
        softcap: Scores become softcap * tanh(scores / softcap).
        sinks: Scores of a key without value that every query sees, ``(heads,)``.

    Returns:
        ``(batch, heads, queries, value_dim)``.
    """
    if view.scale is not None:
        query = (query.float() * view.scale).to(query.dtype)
    has_more = softcap is not None or sinks is not None or dropout > 0 or view.slopes is not None
    if torch.compiler.is_compiling() or has_more or not _has_kernel(query, key, value):
        return _written_out(view, query, key, value, scaling, dropout, softcap, sinks)
    turned: list[Tensor] = []
    for number, part in enumerate(view.parts):
        keys = _needed(view, number)
        turned += [_turned(part.query, query), _turned(part.key, key, keys)]
    out: Tensor = _Merged.apply(view, scaling, value, *turned)  # type: ignore[no-untyped-call]
    return out


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    )


def _needed(view: View, number: int) -> slice:
    """Return the slots from the first to the last that a part needs."""
    pieces = [one.keys for _, block in view.blocks(BLOCK) for one in block if one.part == number]
    return slice(
        min((one.start for one in pieces), default=0), max((one.stop for one in pieces), default=0)
    )


def _turned(turn: Turn | None, states: Tensor, tokens: slice | None = None) -> Tensor:
    """Return turned states, of which only some tokens are needed."""
    if turn is None:
        return states
    if tokens is None or tokens == slice(0, states.shape[2]):
        return turn(states)
    some = turn.part(tokens)(states[:, :, tokens])
    behind = states.shape[2] - tokens.stop
    return functional.pad(some, (0, 0, tokens.start, behind))


class _Merged(torch.autograd.Function):
    """Attention over parts, merged by the logarithms of their sums.

    The gradient of a part is that of attention to its keys alone, given the output and the
    logarithm of all parts together.
    """

    @staticmethod
    def forward(ctx: Any, view: View, scaling: float, value: Tensor, *turned: Tensor) -> Tensor:
        batch, heads, count, width = turned[0].shape
        padded = functional.pad(value, (0, width - value.shape[-1]))
        out = value.new_zeros(batch, heads, count, width)
        # the kernel's own order in memory: heads last
        total = torch.full((batch, count, heads), -torch.inf, device=value.device).transpose(1, 2)
        for rows, pieces in view.blocks(BLOCK):
            found = [_piece(view, rows, piece, padded, turned, scaling) for piece in pieces]
            if not found:
                continue
            logs = torch.stack([log for _, log in found])
            block = torch.logsumexp(logs, dim=0)
            weights = (logs - block).exp().nan_to_num(0.0)[..., None]
            merged = sum(
                weight * part.float() for weight, (part, _) in zip(weights, found, strict=True)
            )
            out[:, :, rows] = merged.to(out.dtype)
            total[:, :, rows] = block
        ctx.view, ctx.scaling, ctx.width = view, scaling, value.shape[-1]
        ctx.save_for_backward(out, total, value, *turned)
        return out[..., : value.shape[-1]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        out, total, value, *turned = ctx.saved_tensors
        width = turned[0].shape[-1]
        padded = functional.pad(value, (0, width - ctx.width))
        gradient = functional.pad(gradient, (0, width - ctx.width)).contiguous()
        sums = [torch.zeros_like(one, dtype=torch.float32) for one in (padded, *turned)]
        # a query that sees no key has no logarithm; all its scores are masked
        total = total.masked_fill(total.isinf(), 0.0)
        for rows, pieces in ctx.view.blocks(BLOCK):
            for piece in pieces:
                query, key = turned[2 * piece.part], turned[2 * piece.part + 1]
                groups = query.shape[1] // key.shape[1]
                mask, _ = _mask(ctx.view, rows, piece, groups, query.dtype)
                folded = [_fold(one[:, :, rows], groups) for one in (gradient, query, out)]
                log = _fold(total[:, :, rows, None], groups)[..., 0]
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    folded[0],
                    folded[1],
                    key[:, :, piece.keys],
                    padded[:, :, piece.keys],
                    folded[2],
                    log.transpose(1, 2).contiguous().transpose(1, 2),
                    0.0,
                    False,
                    attn_mask=mask,
                    scale=ctx.scaling,
                )
                of_value, of_query = sums[0], sums[1 + 2 * piece.part]
                of_key = sums[2 + 2 * piece.part]
                of_query[:, :, rows] += _unfold(found[0], groups)
                of_key[:, :, piece.keys] += found[1]
                of_value[:, :, piece.keys] += found[2]
        of_value, *rest = (
            one.to(held.dtype) for one, held in zip(sums, (value, *turned), strict=True)
        )
        return None, None, of_value[..., : ctx.width], *rest


def _piece(
    view: View, rows: slice, piece: Piece, value: Tensor, turned: Sequence[Tensor], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the output of a piece and the logarithm of its sums, ``(batch, heads, queries)``."""
    query, key = turned[2 * piece.part][:, :, rows], turned[2 * piece.part + 1]
    groups = query.shape[1] // key.shape[1]
    mask, seen = _mask(view, rows, piece, groups, query.dtype)
    out, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _fold(query, groups),
        key[:, :, piece.keys],
        value[:, :, piece.keys],
        0.0,
        False,
        attn_mask=mask,
        scale=scaling,
    )
    out, log = _unfold(out, groups), _unfold(log[..., None], groups)[..., 0]
    if seen is not None:  # the kernel gives 0 for a query that sees no key
        log = log.masked_fill(~seen, -torch.inf)
    return out, log


def _mask(
    view: View, rows: slice, piece: Piece, groups: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to a piece's scores, and which queries see any of its keys."""
    if not piece.masked:
        return None, None
    allowed = view.allowed(view.parts[piece.part], rows, piece.keys)
    added = view.added(rows, piece.keys)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    if added is not None:
        mask = mask + added.to(dtype)
    mask = mask.masked_fill(~allowed, -torch.inf)
    seen = (mask != -torch.inf).any(dim=-1)
    if groups > 1:
        if mask.shape[1] > 1:  # a mask by query head
            return _fold(mask, groups), seen
        mask = mask.repeat(1, 1, groups, 1)
    return mask, seen


def _fold(states: Tensor, groups: int) -> Tensor:
    """Return query heads that share a key head as queries of it."""
    if groups == 1:
        return states
    batch, heads, count, width = states.shape
    return states.reshape(batch, heads // groups, groups * count, width)


def _unfold(states: Tensor, groups: int) -> Tensor:
    """Undo `_fold`."""
    if groups == 1:
        return states
    batch, heads, count, width = states.shape
    return states.reshape(batch, heads * groups, count // groups, width)


def _written_out(
    view: View,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the attention from scores that are written out, for a block of queries at a time."""
    groups = query.shape[1] // key.shape[1]
    turned = [
        (_turned(part.query, query), _turned(part.key, key).repeat_interleave(groups, dim=1))
        for part in view.parts
    ]
    value = value.repeat_interleave(groups, dim=1)

    def block(rows: slice, keys: slice) -> Tensor:
        scores = query.new_full((1,), -torch.inf, dtype=torch.float32)
        added = view.added(rows, keys)
        for part, (queries, all_keys) in zip(view.parts, turned, strict=True):
            own = (queries[:, :, rows] @ all_keys[:, :, keys].mT).float() * scaling
            if softcap is not None:
                own = softcap * torch.tanh(own / softcap)
            if added is not None:
                own = own + added
            scores = torch.where(view.allowed(part, rows, keys), own, scores)
        # a query that sees no key, which is padding, has no weights
        is_empty = ~(scores > -torch.inf).any(dim=-1, keepdim=True)
        if sinks is not None:
            sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        weights = functional.dropout(weights.masked_fill(is_empty, 0.0), dropout)
        return weights.to(value.dtype) @ value[:, :, keys]

    count, tokens = query.shape[2], key.shape[2]
    if torch.compiler.is_compiling():
        return block(slice(0, count), slice(0, tokens))
    size = max(SCORES_AT_ONCE // max(query.shape[0] * query.shape[1] * tokens, 1), 1)
    size = 2 ** int(math.log2(min(size, count)))
    keeps = torch.is_grad_enabled() and any(
        one.requires_grad for pair in (*turned, (value,)) for one in pair
    )
    outs = []
    for rows, pieces in view.blocks(size):
        last = max((piece.keys.stop for piece in pieces), default=1)
        arguments = (rows, slice(0, last))
        if keeps and count > size:  # its scores are computed again in the backward pass
            outs.append(checkpoint(block, *arguments, use_reentrant=False))
        else:
            outs.append(block(*arguments))
    return torch.cat(outs, dim=2)
