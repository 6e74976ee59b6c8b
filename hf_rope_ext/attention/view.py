"""What the queries of a call see: for each band, which keys, and how both are turned there.

A `View` is computed once in a call and serves all attention modules with the same layout. Where
the positions of the keys rise from slot to slot, as in all texts that are not packed, a band is an
interval of slots for each query, and blocks of queries know which keys they need no mask for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_rope_ext.attention.turning import Turn, Turner
from hf_rope_ext.errors import RopeError
from hf_rope_ext.methods.attention_method import AttentionRules, Band, Distances
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.pairs import PairRotation
from hf_rope_ext.rotary.running import Call


@dataclass(eq=False)
class Bound:
    """The attention side of a patch on attention modules of one layout.

    Args:
        rules: The method's attention side.
        rotary: The rotary embedding that rotates their queries and keys.
        query: How queries rotate.
        key: How keys rotate.
    """

    rules: AttentionRules
    rotary: ExtendedRotary
    query: PairRotation
    key: PairRotation
    turners: tuple[Turner, Turner] = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the turns."""
        self.turners = Turner(self.query), Turner(self.key)


@dataclass(frozen=True, eq=False)
class Part:
    """A band, in slots.

    Args:
        low: First slot that each query sees in it, ``(batch or 1, queries)``.
        high: Slot from which it sees none, the same; no later than the query's own + 1.
        within: Where positions do not rise with the slots: first key position, last + 1, each as
            ``low``, and the positions of the keys, ``(batch or 1, keys)``.
        query: How queries turn, None for not at all.
        key: How keys turn.
    """

    low: Tensor
    high: Tensor
    within: tuple[Tensor, Tensor, Tensor] | None = None
    query: Turn | None = None
    key: Turn | None = None


@dataclass(frozen=True)
class Piece:
    """Keys of one part for a block of queries.

    Args:
        part: Number of the part.
        keys: Their slots.
        masked: Whether some query does not see some of them.
    """

    part: int
    keys: slice
    masked: bool


@dataclass(eq=False)
class View:
    """What the queries of a call see.

    Args:
        parts: The bands.
        mask: Which slots hold tokens, ``(batch, keys)``; or what each query may see,
            ``(batch or 1, heads or 1, queries, keys)``, as booleans or as what is added to scores;
            None if that is all up to its own slot.
        scale: Factor on the scores of each query, ``(batch or 1, 1, queries, 1)``, if any.
        slopes: What is taken from scores per position, ``(heads,)``, if anything.
        query: Positions of the queries, float64, ``(batch or 1, queries)``.
        key: Positions of the keys, float64, ``(batch or 1, keys)``.
    """

    parts: Sequence[Part]
    mask: Tensor | None
    scale: Tensor | None
    slopes: Tensor | None
    query: Tensor
    key: Tensor
    plans: dict[int, list[tuple[slice, list[Piece]]]] = field(default_factory=dict)

    def blocks(self, size: int) -> list[tuple[slice, list[Piece]]]:
        """Return blocks of at most ``size`` queries, with the keys that each needs."""
        if size not in self.plans:
            count = self.query.shape[-1]
            self.plans[size] = [
                (rows, self._pieces(rows))
                for start in range(0, count, size)
                for rows in [slice(start, min(start + size, count))]
            ]
        return self.plans[size]

    def allowed(self, part: Part, rows: slice, keys: slice) -> Tensor:
        """Return which keys queries see in a part, as booleans that broadcast to four dimensions.

        What is added to scores is not in it.
        """
        slots = torch.arange(keys.start, keys.stop, device=part.low.device)
        seen = (slots >= part.low[:, rows, None]) & (slots < part.high[:, rows, None])
        if part.within is not None:
            start, stop, key = part.within
            places = key[:, None, keys]
            seen = seen & (places >= start[:, rows, None]) & (places < stop[:, rows, None])
        seen = seen[:, None]
        if self.mask is None:
            return seen
        if self.mask.ndim == 2:
            return seen & self.mask[:, None, None, keys]
        return seen & self.mask[:, :, rows, keys] if self.mask.dtype == torch.bool else seen

    def added(self, rows: slice, keys: slice) -> Tensor | None:
        """Return what is added to scores, if anything."""
        total = None
        if self.mask is not None and self.mask.ndim == 4 and self.mask.dtype != torch.bool:
            total = self.mask[:, :, rows, keys]
        if self.slopes is not None:
            distance = self.query[:, None, rows, None] - self.key[:, None, None, keys]
            bias = (-self.slopes.to(distance.device)[:, None, None] * distance).float()
            total = bias if total is None else total + bias
        return total

    def _pieces(self, rows: slice) -> list[Piece]:
        """Return the pieces of a block: an unmasked middle where there is one, and its edges."""
        pieces = []
        for number, part in enumerate(self.parts):
            low, high = part.low[:, rows], part.high[:, rows]
            first, last = int(low.min()), int(high.max())
            if self.mask is None and part.within is None:
                inner = slice(int(low.max()), int(high.min()))
                if inner.start < inner.stop:
                    edges = [slice(first, inner.start), slice(inner.stop, last)]
                    pieces += [Piece(number, inner, masked=False)]
                    pieces += [
                        Piece(number, edge, True) for edge in edges if edge.start < edge.stop
                    ]
                    continue
            if first < last:
                pieces.append(Piece(number, slice(first, last), masked=True))
        return pieces


def view_of(bound: Bound, call: Call, mask: Tensor | None, tokens: int, heads: int) -> View:
    """Return what the queries of a call see under a method, computed once per call.

    Args:
        bound: The attention module's part of the patch.
        call: The running call.
        mask: As in `View`.
        tokens: Number of keys, cached ones included.
        heads: Number of query heads.

    Raises:
        RopeError: If the positions of the keys are not known.
    """
    name = (id(bound), tokens, heads, None if mask is None else id(mask))
    if name not in call.shared:
        # the mask is kept too, so that its id stays its own
        call.shared[name] = (_view(bound, call, mask, tokens, heads), mask)
    view: View = call.shared[name][0]
    return view


def _view(bound: Bound, call: Call, mask: Tensor | None, tokens: int, heads: int) -> View:
    query, key = _positions(call, tokens)
    label = bound.rotary.names()[bound.query.key]
    rotation = bound.rotary.rotations[label]
    geometry, rules = rotation.geometry, bound.rules
    trained = geometry.original_max_position_embeddings
    assert call.plan.lengths is not None
    length = rotation.policy.round_up(call.plan.lengths.to(query.device).double(), trained)
    if mask is not None and mask.ndim == 2 and _is_left(mask):
        key, mask = key.masked_fill(~mask, -1.0), None  # no band begins before position 0
    asked = Distances(query, key.clamp(min=0.0), trained, length[:, 0])
    inv_freq, _ = bound.rotary.plan(label, None)
    inv_freq = call.plan.frequencies.get(bound.query.key, (inv_freq, 1.0))[0].to(query.device)
    decay = None if rules.method is None else rules.method.decay(geometry)
    decay = None if decay is None else rotation.to_family_order(decay)
    causal = _own_slots(call, query, tokens) + 1
    if mask is not None and mask.ndim == 4:
        causal = torch.full_like(causal, tokens)  # it says so itself
    rises = not torch.compiler.is_compiling() and bool((key.diff(dim=-1) >= 0).all())
    parts = []
    for band in rules.bands(asked):
        turns = (
            bound.turners[0].turn(_step(band.query, query), inv_freq, band.query_gain, decay),
            bound.turners[1].turn(_step(band.key, asked.key), inv_freq, band.key_gain, decay),
        )
        parts.append(Part(*_slots(band, query, key, causal, rises), *turns))
    scale = rules.factors(asked)
    slopes = None if rules.method is None else rules.method.slopes(heads)
    return View(
        parts,
        mask,
        None if scale is None else scale.float()[:, None, :, None],
        slopes,
        query,
        key,
    )


def _positions(call: Call, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the positions of queries and keys, float64; with several axes, those of the first."""
    own, held = call.own, call.plan.positions
    if own is not None and held is None:
        held = own
    if own is None or held is None or held.shape[-1] < tokens:
        known = 0 if held is None else held.shape[-1]
        raise RopeError(
            f"the attention got {tokens} keys and the positions of {known}, so it cannot tell "
            f"their distances; fill a new cache with all tokens."
        )
    first = [one[0] if one.ndim == 3 else one for one in (own, held[..., :tokens])]
    return first[0].double(), first[1].double()


def _own_slots(call: Call, query: Tensor, tokens: int) -> Tensor:
    """Return the slot of each query, ``(1, queries)``."""
    count = query.shape[-1]
    before = call.seen if call.slots is not None else tokens - count
    return (torch.arange(count, device=query.device) + before)[None]


def _is_left(mask: Tensor) -> bool:
    """Return whether all padding is in front of the tokens."""
    return not torch.compiler.is_compiling() and bool((mask[:, 1:] >= mask[:, :-1]).all())


def _step(target: Tensor | None, own: Tensor) -> Tensor | None:
    return None if target is None else target - own


def _slots(
    band: Band, query: Tensor, key: Tensor, causal: Tensor, rises: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Return a band's slots, and its bounds as positions where slots do not say them."""
    everywhere = torch.zeros_like(query)
    start = everywhere if band.start is None else band.start.clamp(min=0.0)
    stop = everywhere + torch.inf if band.stop is None else band.stop
    rows = max(len(query), len(key), len(start), len(stop))
    shape = (rows, query.shape[-1])
    start, stop = start.expand(shape), stop.expand(shape)
    causal = causal.expand(shape)
    if not rises:
        return torch.zeros_like(causal), causal, (start, stop, key)
    key = key.expand(rows, -1).contiguous()
    low = torch.searchsorted(key, start.contiguous())
    high = torch.minimum(torch.searchsorted(key, stop.contiguous()), causal)
    return low, torch.maximum(high, low), None
