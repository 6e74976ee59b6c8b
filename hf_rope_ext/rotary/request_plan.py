"""Plans of requests: which length decides the frequencies of a length-dependent method.

A call without a cache is a request of its own: the length of each row is the largest position of
its tokens + 1, without padding and whatever else is in the batch. A cache keeps one plan for all
its tokens, because the keys and values of deeper layers come from hidden states computed under it:
`generate` knows its last position in advance, a cache of fixed size knows its size, and only a
hand-written loop can outgrow its plan. Plans live on their cache and on the running call, never on
a module.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.checks import require_choice, require_number
from hf_rope_ext.errors import MethodParameterError, RopeError
from hf_rope_ext.geometry import Scale
from hf_rope_ext.models.host import is_cache, output_cache, self_attention_cache

ON_GROWTH = ("rerotate", "error", "freeze")
GROWTH = 1.1
"""Growth step of an outgrown plan where ``buckets`` is not set."""


@dataclass(frozen=True)
class RequestPolicy:
    """How a length-dependent method follows requests: ``patch_model(..., requests=...)``.

    Args:
        on_growth: What to do when a hand-written loop outgrows the plan of its cache:
            ``"rerotate"`` rotates the cached keys to the longer plan's angles, ``"error"`` raises
            before the call, ``"freeze"`` continues with the existing plan.
        buckets: Round planned lengths beyond the trained one up to the trained length times a
            power of this number, above 1; None plans for the exact length.
        compat: ``"transformers"`` reproduces stock transformers instead: one length for the whole
            batch, chosen anew at every call, cached keys left as they are.
        on_plan: Called with the `RequestPlan` of every request when it is made or grown.
    """

    on_growth: str = "rerotate"
    buckets: float | None = None
    compat: str | None = None
    on_plan: Callable[["RequestPlan"], None] | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        require_choice("on_growth", self.on_growth, ON_GROWTH, MethodParameterError)
        if self.buckets is not None:
            require_number("buckets", self.buckets, above=1, error=MethodParameterError)
        require_choice("compat", self.compat, (None, "transformers"), MethodParameterError)
        if self.on_plan is not None and not callable(self.on_plan):
            raise MethodParameterError(f"on_plan must be a function, got {self.on_plan!r}.")
        idle = [name for name in self.changed_settings() if name != "compat"]
        if self.compat is not None and idle:
            raise MethodParameterError(
                f"{', '.join(idle)} has no effect with compat={self.compat!r}, which plans no "
                f"request; leave one of the two out."
            )

    def changed_settings(self) -> list[str]:
        """Return the names of settings that differ from their defaults."""
        return [own.name for own in fields(self) if getattr(self, own.name) != own.default]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data: every setting in force but the callback."""
        if self.compat is not None:
            return {"compat": self.compat}
        return {"on_growth": self.on_growth, "buckets": self.buckets}

    def round_up(self, lengths: Tensor, trained: int) -> Tensor:
        """Return lengths rounded up to buckets; those within the trained length stay."""
        if self.buckets is None:
            return lengths
        # a millionth of a step, so that rounding does not push an exact bucket to the next
        steps = (torch.log(lengths / trained) / math.log(self.buckets) - 1e-6).ceil()
        return torch.where(lengths > trained, trained * self.buckets**steps, lengths)

    def grow(self, lengths: Tensor, trained: int) -> Tensor:
        """Return lengths that a loop may grow to next: the next geometric step of each."""
        step = self.buckets or GROWTH
        steps = (torch.log((lengths / trained).clamp(min=1)) / math.log(step) - 1e-6).ceil()
        return torch.maximum(lengths, (trained * step**steps).ceil())


@dataclass(eq=False, slots=True)  # without a __dict__, exporters that walk a cache leave it alone
class CachePlan:
    """The plan of one request, kept on its cache.

    Args:
        method: The method, as text; a cache cannot be used with another one.
        trained: Trained length in positions.
        policy: The policy it was made under.
        capacity: Number of tokens, padding included, that it covers.
        lengths: Length of each row in positions, ``(batch or 1, 1, 1)``; None before the first
            call.
        positions: Positions of all cached tokens as passed to the rotary embedding; None where
            growth does not need them.
        frequencies: Frequencies and scaling by rotary module and layer type, computed on first use.
        content: What the cache was filled with beside token ids, by argument: the number of
            values and the fingerprint of each tensor, in order.
        unknown: Number of tokens it held before the plan was made, at unknown positions.
        learned: Number of learned keys at its start, which are not rotated.
        is_fixed: Whether the cache is of fixed size, so that its keys stay as they are.
        is_compiled: Whether it was made in compiled code, which cannot let it follow the rows.
    """

    method: str
    trained: int
    policy: RequestPolicy
    capacity: int
    lengths: Tensor | None = None
    positions: Tensor | None = None
    frequencies: dict[str, tuple[Tensor, Scale]] = field(default_factory=dict)
    content: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    unknown: int = 0
    learned: int = 0
    is_fixed: bool = False
    is_compiled: bool = False

    def report(self) -> "RequestPlan":
        """Return its public form."""
        assert self.lengths is not None, "before the first call"
        lengths = self.policy.round_up(self.lengths, self.trained)
        return RequestPlan(self.method, lengths.flatten(), self.trained)


@dataclass(frozen=True, eq=False)
class RequestPlan:
    """What a request is planned for.

    Args:
        method: The method and its knobs, as text.
        lengths: Length of each row in positions, ``(rows,)``, on the model's device.
        trained: The trained length in positions.
    """

    method: str
    lengths: Tensor
    trained: int

    @property
    def factors(self) -> list[float]:
        """Each row's length over the trained length, at least 1 (synchronizes with the device)."""
        ratios: list[float] = (self.lengths / self.trained).clamp(min=1.0).tolist()
        return ratios


def plan_of(cache: Any) -> CachePlan | None:
    """Return the plan on a cache, or on its self-attention part; None if there is none."""
    return getattr(self_attention_cache(cache), "hf_rope_ext_plan", None)


def request_plan(held: Any) -> RequestPlan | None:
    """Return what a request is planned for.

    Args:
        held: A cache, or a model output that holds one, of a model patched with a length-dependent
            method.

    Returns:
        None where no plan was made.

    Raises:
        RopeError: If it is neither.
    """
    cache = held if is_cache(held) else output_cache(held)
    if cache is None:
        raise RopeError(
            f"request_plan takes a cache, or a model's output with one (use_cache=True), got "
            f"{type(held).__name__}."
        )
    plan = plan_of(cache)
    return None if plan is None or plan.lengths is None else plan.report()


def row_lengths(
    position_ids: Tensor, mask: Tensor | None = None, ahead: int = 0, *, from_last: bool = False
) -> Tensor:
    """Return the final length of each row, in positions: the one rule for every kind of request.

    Args:
        position_ids: ``(batch or 1, seq)``, or ``(axes, batch or 1, seq)`` for M-RoPE, where the
            length is the largest position over all axes.
        mask: Which tokens count, ``(batch, seq)``, nonzero for all but padding; None if all do.
        ahead: Number of tokens to come.
        from_last: Whether these continue from the last token, as in ``generate``, even where an
            earlier one has a larger position. A model that counts them itself continues from the
            largest one, which is that of a frame where a long video stands near the end.

    Returns:
        Float64 (float32 where the device has no float64), shape ``(batch, 1, 1)``.
    """
    precise = torch.float32 if position_ids.device.type == "mps" else torch.float64
    # rounded up, since `visual_positions` may place tokens at fractional positions
    places = position_ids.ceil().to(precise)
    if places.ndim == 3:
        places = places.amax(dim=0)
    counts = torch.ones_like(places[:1]) if mask is None else mask.to(places.device) != 0
    places = places.masked_fill(counts == 0, -1.0)
    longest = last = places.amax(dim=-1)
    if from_last:
        order = torch.arange(1, counts.shape[-1] + 1, device=places.device)
        index = (counts * order).argmax(dim=-1, keepdim=True).expand(len(places), 1)
        last = places.gather(-1, index)[..., 0]
    return (torch.maximum(longest, last + ahead) + 1).reshape(-1, 1, 1)
