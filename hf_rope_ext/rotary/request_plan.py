"""Plans of requests: which length decides the frequencies of a length-dependent method.

A call without a cache is a request of its own: the length of each row is its largest position + 1,
whatever else is in the batch. A cache keeps one plan for all its tokens, because the keys and
values of deeper layers come from hidden states computed under it: `generate` knows its last
position in advance, a cache of fixed size knows its size, and only a hand-written loop can outgrow
its plan. Plans live on their cache and on the running call, never on a module.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.checks import require_choice, require_number
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import Scale
from hf_rope_ext.models.host import output_cache

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

    def grow(self, tokens: int, trained: int) -> int:
        """Return the new capacity of a cache that must hold ``tokens``: the next geometric step."""
        step = self.buckets or GROWTH
        steps = math.ceil(math.log(max(tokens / trained, 1.0)) / math.log(step) - 1e-6)
        return max(tokens, math.ceil(trained * step**steps))


@dataclass(eq=False)
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
        has_images: Whether position axes have ever differed, a boolean scalar tensor; None where
            there is one axis.
    """

    method: str
    trained: int
    policy: RequestPolicy
    capacity: int
    lengths: Tensor | None = None
    positions: Tensor | None = None
    frequencies: dict[str, tuple[Tensor, Scale]] = field(default_factory=dict)
    has_images: Tensor | None = None

    def report(self) -> "RequestPlan":
        """Return its public form."""
        assert self.lengths is not None, "before the first call"
        lengths = self.policy.round_up(self.lengths, self.trained)
        return RequestPlan(self.method, lengths.flatten(), self.trained)


@dataclass(eq=False)
class Call:
    """A running forward of a text model.

    Args:
        plan: The plan of its request.
        seen: Number of tokens in the cache before this call.
        ahead: Number of positions beyond this call that the plan covers.
        size: Capacity of a cache of fixed size in positions, None for other caches.
        records: Whether to record positions, for growth.
        outer: The call it is nested in.
        is_new: Whether the plan is made in this call.
        is_noted: Whether its positions have been recorded.
        owner: The planner that began it.
    """

    plan: CachePlan
    seen: int = 0
    ahead: int = 0
    size: int | None = None
    records: bool = False
    outer: "Call | None" = None
    is_new: bool = True
    is_noted: bool = False
    owner: object = None

    def record_positions(self, position_ids: Tensor) -> Tensor:
        """Record the positions of the call; the first rotary embedding that gets them does this.

        Returns:
            The planned length of each row, ``(batch or 1, 1, 1)``.
        """
        plan = self.plan
        if plan.lengths is None:
            plan.lengths = row_lengths(position_ids) + self.ahead
            if self.size is not None:  # a video can take more positions than tokens
                plan.lengths = plan.lengths.clamp(min=self.size)
        if position_ids.ndim == 3 and position_ids.shape[-1] > 1 and not self.is_noted:
            differ = (position_ids != position_ids[:1]).any()
            plan.has_images = differ if plan.has_images is None else plan.has_images | differ
        if self.records and not self.is_noted:
            past = plan.positions
            if past is None or self.seen == 0:
                plan.positions = position_ids
            else:
                # one row may stand for all rows, and one axis for all axes
                shape = (*torch.broadcast_shapes(past.shape[:-1], position_ids.shape[:-1]), -1)  # type: ignore[no-untyped-call]
                both = (past[..., : self.seen].expand(shape), position_ids.expand(shape))
                plan.positions = torch.cat(both, dim=-1)
        self.is_noted = True
        return plan.lengths


@dataclass
class Generation:
    """A running ``generate``.

    Args:
        max_length: Final number of tokens of the longest row; None until it is known.
        input_ids: Its prompt, ``(batch, seq)``, if it has one.
        outer: The one it is nested in, such as that of the model an assistant drafts for.
        reports: Whether its plans are reported to ``on_plan``.
    """

    max_length: int | None = None
    input_ids: Tensor | None = None
    outer: "Generation | None" = None
    reports: bool = True


class _Running(threading.local):
    """The call and the generation that are running in this thread."""

    call: Call | None = None
    generation: Generation | None = None


RUNNING = _Running()


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
    """Return the plan on a cache; None if there is none."""
    return getattr(cache, "hf_rope_ext_plan", None)


def request_plan(held: Any) -> RequestPlan | None:
    """Return what a request is planned for.

    Args:
        held: A cache, or a model output that holds one, of a model patched with a length-dependent
            method.

    Returns:
        None where no plan was made.
    """
    plan = plan_of(held) or plan_of(output_cache(held))
    return None if plan is None or plan.lengths is None else plan.report()


def row_lengths(position_ids: Tensor) -> Tensor:
    """Return the length of each row, in positions.

    Args:
        position_ids: ``(batch, seq)``, or ``(axes, batch, seq)`` for M-RoPE, where the length is
            the largest position over all axes.

    Returns:
        Float64 (float32 where the device has no float64), shape ``(batch, 1, 1)``.
    """
    if position_ids.ndim == 3:
        position_ids = position_ids.amax(dim=0)
    longest = position_ids.amax(dim=-1) + 1
    precise = torch.float32 if longest.device.type == "mps" else torch.float64
    return longest.to(precise).reshape(-1, 1, 1)
