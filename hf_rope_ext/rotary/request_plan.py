"""Which length decides the plan of a length-dependent method.

A call without a cache is its own request: each row's length is its largest position + 1, whatever
its neighbours in the batch, the padding or the shape of the tensors. A cache has one plan from its
first token to its last, because keys and values of deeper layers come from hidden states made under
it: `generate` knows its last position beforehand, a cache of fixed size its size, and only a loop
written by hand can outgrow its plan. Plans live with their cache and with the running call, never
on a module.
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

ON_GROWTH = ("rerotate", "error", "freeze")
GROWTH = 1.1
"""By what an outgrown plan grows where ``buckets`` says nothing."""


@dataclass(frozen=True)
class RequestPolicy:
    """How a length-dependent method follows requests: ``patch_model(..., requests=...)``.

    Args:
        on_growth: What happens when a loop written by hand outgrows the plan of its cache:
            ``"rerotate"`` turns the cached keys to the longer plan's angles, ``"error"`` raises
            before the call, ``"freeze"`` goes on with the plan there is.
        buckets: Planned lengths beyond the trained one are rounded up to the trained length times
            a power of this; None plans for the request exactly.
        compat: ``"transformers"`` follows stock transformers instead: one length for the whole
            batch, chosen anew at every call, cached keys as they were.
        on_plan: Called with the `RequestPlan` of every request as soon as it is made or grown.
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
        """Return the names of the settings that are not at their default."""
        return [own.name for own in fields(self) if getattr(self, own.name) != own.default]

    def to_dict(self) -> dict[str, Any]:
        """Return what a record keeps of it: everything but the function to call."""
        if self.compat is not None:
            return {"compat": self.compat}
        return {"on_growth": self.on_growth, "buckets": self.buckets}

    def round_up(self, lengths: Tensor, trained: int) -> Tensor:
        """Return lengths rounded up to buckets; those within the trained length stay."""
        if self.buckets is None:
            return lengths
        # one millionth of a step keeps a length that is a bucket in it
        steps = (torch.log(lengths / trained) / math.log(self.buckets) - 1e-6).ceil()
        return torch.where(lengths > trained, trained * self.buckets**steps, lengths)

    def grow(self, tokens: int, trained: int) -> int:
        """Return the capacity of a cache that needs to hold ``tokens``: a geometric step."""
        step = self.buckets or GROWTH
        steps = math.ceil(math.log(max(tokens / trained, 1.0)) / math.log(step) - 1e-6)
        return max(tokens, math.ceil(trained * step**steps))


@dataclass(eq=False)
class CachePlan:
    """What one request is planned for; its cache carries it.

    Args:
        method: What it was planned with, in words; a cache is used with no other.
        trained: The trained length in positions.
        policy: How it was planned.
        capacity: Tokens, padding included, that it is good for.
        lengths: Length of each row in positions, ``(batch or 1, 1, 1)``; None before the first
            call.
        positions: Position of every cached token as the rotary embedding was given them; None
            where growth needs none.
        frequencies: Frequencies and scaling by rotary module and layer type, made at first use.
        has_images: Whether axes of positions have differed, a tensor of one truth value; None where
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
        """Return it in public form."""
        assert self.lengths is not None, "before the first call"
        lengths = self.policy.round_up(self.lengths, self.trained)
        return RequestPlan(self.method, lengths.flatten(), self.trained)


@dataclass(eq=False)
class Call:
    """One running forward of a text model.

    Args:
        plan: Of its request.
        seen: Tokens in the cache before this call.
        ahead: Positions beyond this call that the plan is for.
        size: Positions a cache of fixed size has room for, None for other caches.
        records: Whether positions are kept, for growth.
        outer: The call it runs in.
        is_new: Whether the plan is made in this call.
        is_noted: Whether its positions were seen.
        owner: Who began it.
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
        """Take in the positions of the call, at the first rotary embedding that gets them.

        Returns:
            The planned length of each row, ``(batch or 1, 1, 1)``.
        """
        plan = self.plan
        if plan.lengths is None:
            plan.lengths = row_lengths(position_ids) + self.ahead
            if self.size is not None:  # videos can take more positions than tokens
                plan.lengths = plan.lengths.clamp(min=self.size)
        if position_ids.ndim == 3 and position_ids.shape[-1] > 1 and not self.is_noted:
            differ = (position_ids != position_ids[:1]).any()
            plan.has_images = differ if plan.has_images is None else plan.has_images | differ
        if self.records and not self.is_noted:
            past = plan.positions
            if past is None or self.seen == 0:
                plan.positions = position_ids
            else:
                # a row can stand for all rows, and one axis for all axes
                shape = (*torch.broadcast_shapes(past.shape[:-1], position_ids.shape[:-1]), -1)  # type: ignore[no-untyped-call]
                both = (past[..., : self.seen].expand(shape), position_ids.expand(shape))
                plan.positions = torch.cat(both, dim=-1)
        self.is_noted = True
        return plan.lengths


@dataclass
class Generation:
    """One running ``generate``.

    Args:
        max_length: Tokens of the longest row when it is done; None until it is known.
        input_ids: The text it was given, ``(batch, seq)``, None where there is none.
        outer: The one it runs in, such as that of the model an assistant drafts for.
    """

    max_length: int | None = None
    input_ids: Tensor | None = None
    outer: "Generation | None" = None


class _Running(threading.local):
    """What runs in this thread."""

    call: Call | None = None
    generation: Generation | None = None


RUNNING = _Running()


@dataclass(frozen=True, eq=False)
class RequestPlan:
    """What a request is planned for.

    Args:
        method: Name and knobs of the method.
        lengths: Length of each row in positions, ``(rows,)``, on the model's device.
        trained: The trained length in positions.
    """

    method: str
    lengths: Tensor
    trained: int

    @property
    def factors(self) -> list[float]:
        """Length over trained length of each row, at least 1 (waits for the device)."""
        ratios: list[float] = (self.lengths / self.trained).clamp(min=1.0).tolist()
        return ratios


def plan_of(held: Any) -> CachePlan | None:
    """Return the plan of a cache, or of a model output that holds one; None where there is none."""
    cache = getattr(held, "past_key_values", held)
    return getattr(cache, "hf_rope_ext_plan", None)


def request_plan(held: Any) -> RequestPlan | None:
    """Return what a request is planned for.

    Args:
        held: A cache, or a model output that holds one, of a model patched with a length-dependent
            method.

    Returns:
        None where no plan was made.
    """
    plan = plan_of(held)
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
