"""Shifted sparse attention (S2-Attn): train long sequences at the price of short ones.

LongLoRA (Chen et al., 2023, arXiv:2309.12307, sec. 3.2): the sequence is cut into groups, and a
token attends within its group; half of the heads have their groups shifted by half a group, so
that information crosses the borders. It is for training only; evaluation and use attend in full.

The paper shifts by rolling the sequence, which puts its first tokens behind its last ones in one
group and lets them attend to the future. Here the shifted heads' first and last groups are half
ones, and no token sees a later one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_rope_ext.changes import SetAttributes, apply_all, revert_all
from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host

NAME = "hf_rope_shifted"
"""Under which transformers knows the attention and its mask."""

_GROUPS = "_hf_rope_groups"


class ShiftedAttention:
    """The change that makes a model attend in shifted groups while it trains.

    In ``eval()`` the model computes its full attention, as before.

    Args:
        model: A transformers model or a PEFT model around one.
        groups: Number of groups that a sequence is cut into; the paper takes 4.

    Raises:
        RopeError: If the family does not use transformers' attention interface, or ``groups`` is
            less than 2.
    """

    def __init__(self, model: nn.Module, groups: int = 4) -> None:
        from transformers import PreTrainedModel

        require_integer("groups", groups, least=2)
        models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        if not models or not host.takes_attention(models[0]):
            raise RopeError(
                f"{type((models or [model])[0]).__name__} does not use transformers' attention "
                f"interface, so its attention cannot be replaced; train with full attention."
            )
        self.model: Any = models[0]
        self.groups = [
            SetAttributes(part, {_GROUPS: groups})
            for part in model.modules()
            if "attention" in type(part).__name__.lower()
        ]
        self.configs = list({id(c): c for part in models for c in _configs(part.config)}.values())
        self.before: list[str | None] | None = None

    def apply(self) -> None:
        """Replace the attention."""
        # by this name alone, which no model uses that is not told to
        host.register_attention(NAME, shifted_attention)
        self.before = [host.attention_name(config) for config in self.configs]
        self.model.set_attn_implementation(NAME)
        apply_all(self.groups)

    def revert(self) -> None:
        """Put the model's own attention back."""
        revert_all(self.groups)
        if self.before is not None:
            for config, implementation in zip(self.configs, self.before, strict=True):
                host.set_attention_name(config, implementation)
            self.before = None


def shifted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in shifted groups in training, in full otherwise; an attention of transformers.

    Args:
        module: The attention module.
        query: ``(batch, heads, seq, head_dim)``.
        key: ``(batch, kv_heads, kv_seq, head_dim)``.
        value: As ``key``.
        attention_mask: None for plain causal, else ``(batch, 1, seq, kv_seq)``, true where a query
            may attend; it holds within the groups too.
        dropout: Of the attention weights.
        scaling: Of the logits.
        **kwargs: What else transformers passes.

    Returns:
        ``(batch, seq, heads, head_dim)`` and None.

    Raises:
        RopeError: If the sequence cannot be cut into groups of an even number of tokens.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = getattr(module, _GROUPS, None)
    if not module.training or groups is None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise RopeError(
            "shifted attention has no soft cap and no sinks; train with full attention."
        )
    length, heads = query.shape[2], query.shape[1]
    if length % (2 * groups):
        raise RopeError(
            f"shifted attention cuts {length} tokens into {groups} groups of an even size; use a "
            f"sequence length that is a multiple of {2 * groups}."
        )
    size, half, straight = length // groups, length // groups // 2, heads - heads // 2
    key, value = (repeat_kv(states, heads // key.shape[1]) for states in (key, value))

    def attend(heads: slice, start: int, stop: int, width: int) -> Tensor:
        q, k, v = (states[:, heads, start:stop] for states in (query, key, value))
        mask = _spans(attention_mask, start, (stop - start) // width, width)
        return _attend(q, k, v, mask, width, dropout, scaling)

    second = slice(straight, heads)
    shifted = [
        attend(second, 0, half, half),
        attend(second, half, length - half, size),
        attend(second, length - half, length, half),
    ]
    first = attend(slice(0, straight), 0, length, size)
    out = torch.cat((first, torch.cat(shifted, dim=2)), dim=1)
    return out.transpose(1, 2).contiguous(), None


def _configs(config: Any) -> Iterator[Any]:
    """Yield a config and those inside it, outer ones first: setting one reaches those inside."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configs(inner)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    width: int,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attend within spans of ``width`` tokens; all tensors ``(batch, heads, seq, head_dim)``."""
    batch, spans = len(query), query.shape[2] // width
    folded = [
        states.reshape(batch, -1, spans, width, states.shape[-1]).transpose(1, 2).flatten(0, 1)
        for states in (query, key, value)
    ]
    out = functional.scaled_dot_product_attention(
        folded[0],
        folded[1],
        folded[2],
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
    )
    out = out.reshape(batch, spans, -1, width, value.shape[-1])
    return out.transpose(1, 2).flatten(2, 3)


def _spans(mask: Tensor | None, start: int, spans: int, width: int) -> Tensor | None:
    """Return the blocks of a mask on the diagonal, ``(batch * spans, 1, width, width)``."""
    if mask is None:
        return None
    places = [slice(start + index * width, start + (index + 1) * width) for index in range(spans)]
    blocks = torch.stack([mask[:, :, place, place] for place in places], dim=1)
    return blocks.flatten(0, 1)
