"""Attention at chosen distances, written out in float64 from the definitions, for any family.

A model whose tokens are all at position 0 hands unrotated queries and keys to its attention, so
this one rotates by what it is told: nothing of the library is used.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


@dataclass(frozen=True)
class Layout:
    """How many coordinates of a head rotate, how they are paired, and whether they come last."""

    width: int
    interleaved: bool = False
    last: bool = False
    base: float = 10000.0


FAMILIES = {
    "llama": Layout(16),
    "qwen3": Layout(16),
    "gpt_neox": Layout(8),
    "cohere": Layout(16, interleaved=True, base=5e5),
    "gemma2": Layout(16),
    "phi3": Layout(16),
    "glm4": Layout(8, interleaved=True),
    "gptj": Layout(8, interleaved=True),
    "deepseek_v3": Layout(16, last=True),
    "gpt_oss": Layout(16, base=1.5e5),
    "stablelm": Layout(8),
    "qwen2_vl": Layout(16, base=1e6),
}


@dataclass
class Rule:
    """What is computed: the distance of each pair of tokens, and what is done to its score.

    Args:
        distance: The distance at which a query at m sees a key at n, as a function of both; None
            for a key it does not see.
        scale: Factor on the scores of a query at m.
        slope: What is taken from a score, as a function of head, heads, m and n.
        decay: Length of xPos.
    """

    distance: object
    scale: object = None
    slope: object = None
    decay: float | None = None


def expected_logits(model, layout, rule, ids, positions=None, padding=None):
    """Logits of an unpatched model under a rule, ``(batch, seq, vocabulary)``.

    Args:
        positions: Of every token, ``(batch, seq)``; from 0 on by default.
        padding: Which tokens count, ``(batch, seq)``; all by default.
    """
    rows, count = ids.shape
    if positions is None:
        positions = torch.arange(count).expand(rows, -1)
    if padding is None:
        padding = torch.ones_like(ids)
    rows_at = [tuple(row.tolist()) for row in positions]
    made = {places: _table(rule, places) for places in set(rows_at)}
    tables = [made[places] for places in rows_at]

    def attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **more):
        plain = more.get("sliding_window") is not None
        heads = query.shape[1]
        key, value = (one.repeat_interleave(heads // one.shape[1], 1) for one in (key, value))
        out = torch.stack(
            [
                _attend(
                    query[row].double(),
                    key[row].double(),
                    value[row].double(),
                    layout,
                    rule,
                    tables[row],
                    positions[row],
                    padding[row].bool(),
                    plain,
                    query.shape[-1] ** -0.5 if scaling is None else scaling,
                    softcap,
                    s_aux,
                )
                for row in range(rows)
            ]
        )
        return out.to(value.dtype).transpose(1, 2), None

    zeros = torch.zeros_like(ids)
    with registered(model, attention), torch.no_grad():
        return model(
            input_ids=ids, position_ids=zeros, attention_mask=padding, use_cache=False
        ).logits


def _table(rule, places):
    """Distances, sight and scales of one row."""
    count = len(places)
    distance = torch.zeros(count, count, dtype=torch.float64)
    sees = torch.zeros(count, count, dtype=torch.bool)
    for i, m in enumerate(places):
        for j, n in enumerate(places[: i + 1]):
            found = rule.distance(m, n)
            if found is not None:
                distance[i, j], sees[i, j] = found, True
    return distance, sees


def _attend(
    query,
    key,
    value,
    layout,
    rule,
    table,
    places,
    padding,
    plain,
    scaling,
    softcap,
    sinks,
):
    distance, sees = table
    if plain:  # a layer with a sliding window, longer than the text
        distance = (places[:, None] - places[None, :]).double()
        sees = torch.ones_like(sees).tril()
    heads, _, width = query.shape
    start = width - layout.width if layout.last else 0
    chosen = slice(start, start + layout.width)
    rest = [index for index in range(width) if index not in range(chosen.start, chosen.stop)]
    pairs = layout.width // 2
    frequencies = layout.base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    if rule.slope is not None and not plain:
        frequencies = frequencies * 0
    q, k = (as_complex(one[..., chosen], layout.interleaved) for one in (query, key))
    turned = torch.polar(torch.ones(()).double(), distance[..., None] * frequencies)
    if rule.decay is not None and not plain:
        zeta = (torch.arange(pairs, dtype=torch.float64) / pairs + 0.4) / 1.4
        turned = turned * zeta ** (distance[..., None] / rule.decay)
    scores = torch.einsum("hmp,hnp,mnp->hmn", q, k.conj(), turned).real
    scores = (scores + query[..., rest] @ key[..., rest].mT) * scaling
    if rule.scale is not None and not plain:
        scores = scores * torch.tensor([rule.scale(m) for m in places.tolist()])[:, None]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if rule.slope is not None and not plain:
        scores = scores - torch.tensor(
            [
                [[rule.slope(head, heads, m, n) for n in places.tolist()] for m in places.tolist()]
                for head in range(heads)
            ],
            dtype=torch.float64,
        )
    scores = scores.masked_fill(~(sees & padding[None, :]), -math.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(heads, scores.shape[1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.nan_to_num(0.0) @ value


def as_complex(states, interleaved):
    if interleaved:
        return torch.complex(states[..., ::2].contiguous(), states[..., 1::2].contiguous())
    first, second = states.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


@contextmanager
def registered(model, attention):
    AttentionInterface.register("brute_force", attention)
    AttentionMaskInterface.register("brute_force", sdpa_mask)
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = "brute_force"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
