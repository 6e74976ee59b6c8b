"""What is running: the requests that a context has announced, and the calls that a thread is in.

A generation belongs to a context (`contextvars`), so that tasks of an event loop, threads and
nested ``generate`` each see their own, and to the models that it runs. Calls belong to a thread,
since a forward runs to its end in one.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_rope_ext.rotary.request_plan import CachePlan, row_lengths


@dataclass(eq=False)
class Call:
    """A running forward of a text model.

    Args:
        plan: The plan of its request.
        planners: The planner whose text model runs.
        owner: Whose hooks began it.
        seen: Number of tokens in the cache before this call, a tensor where only the device knows.
        ahead: Number of tokens after this call that the plan covers.
        mask: Which tokens of the call count, ``(batch, seq)``; None if all do.
        lengths: Final length of each row, ``(batch, 1, 1)``, where it is known in advance.
        size: Capacity of a cache of fixed size in positions, None for other caches.
        slots: Capacity of a cache of fixed size in tokens, where its positions are recorded.
        records: Whether to record positions in a growing cache.
        outer: The call it is nested in.
        is_new: Whether the plan is made in this call.
        is_noted: Whether its positions have been recorded.
        own: Positions of its own tokens, as passed to the rotary embedding.
        shared: What the attention modules of the call compute once for all.
    """

    plan: CachePlan
    planners: Sequence[object] | None = None
    owner: object = None
    seen: int | Tensor = 0
    ahead: int = 0
    mask: Tensor | None = None
    lengths: Tensor | None = None
    size: int | None = None
    slots: int | None = None
    records: bool = False
    outer: "Call | None" = None
    is_new: bool = True
    is_noted: bool = False
    own: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def record_positions(self, position_ids: Tensor) -> Tensor:
        """Record the positions of the call; the first rotary embedding that gets them does this.

        Returns:
            The planned length of each row, ``(batch or 1, 1, 1)``.
        """
        plan = self.plan
        if plan.lengths is None:
            plan.lengths = self.lengths
        if plan.lengths is None:
            plan.lengths = row_lengths(position_ids, self.mask, self.ahead)
            if self.size is not None:  # a video can take more positions than tokens
                plan.lengths = plan.lengths.clamp(min=self.size)
        if not self.is_noted:
            self.own = position_ids
            if self.slots is not None:
                plan.positions = self._in_slots(plan.positions, position_ids)
            elif self.records:
                plan.positions = self._appended(plan.positions, position_ids)
        self.is_noted = True
        return plan.lengths

    def _appended(self, past: Tensor | None, position_ids: Tensor) -> Tensor:
        """Return the positions of a growing cache after this call."""
        if past is None and self.seen:  # a learned prefix
            past = position_ids.new_zeros(*position_ids.shape[:-1], int(self.seen))
        if past is None or self.seen == 0:
            return position_ids
        past, position_ids = _same_rows(past[..., : self.seen], position_ids)
        return torch.cat((past, position_ids), dim=-1)

    def _in_slots(self, past: Tensor | None, position_ids: Tensor) -> Tensor:
        """Return the positions of a cache of fixed size after this call, 0 in its free slots."""
        assert self.slots is not None
        if past is None:
            past = position_ids.new_zeros(*position_ids.shape[:-1], self.slots)
        past, position_ids = _same_rows(past, position_ids)
        index = torch.arange(position_ids.shape[-1], device=position_ids.device) + self.seen
        return past.index_copy(-1, index, position_ids)


def _same_rows(past: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions with equally many rows and axes, one of which may stand for all."""
    if past.shape[:-1] == position_ids.shape[:-1]:
        return past, position_ids
    shape = torch.broadcast_shapes(past.shape[:-1], position_ids.shape[:-1])  # type: ignore[no-untyped-call]
    return past.expand(*shape, -1), position_ids.expand(*shape, -1)


@dataclass(eq=False)
class Generation:
    """A running ``generate``, or a block of `planned`.

    Args:
        max_length: Final number of tokens of the longest row; None until it is known.
        lengths: Final length of each row in positions, ``(batch, 1, 1)``, if it is known.
        input_ids: Its prompt, ``(batch, seq)``, if it has one.
        arguments: The arguments it was called with.
        models: The models that it generates with, by `id`; empty for a block of `planned`.
        planners: Planners of the text models it is for; None for all.
        virtual_tokens: Number of learned tokens that an adapter puts before the prompt.
        outgrows: Whether it needs a longer plan than its cache has.
        is_noted: Whether its arguments are noted on its cache.
        outer: The one it is nested in, such as that of the model an assistant drafts for.
        reports: Whether its plans are reported to ``on_plan``.
        is_open: Whether it still runs.
    """

    max_length: int | None = None
    lengths: Tensor | None = None
    input_ids: Tensor | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    models: frozenset[int] = frozenset()
    planners: Sequence[object] | None = None
    virtual_tokens: int = 0
    outgrows: bool = False
    is_noted: bool = False
    outer: "Generation | None" = None
    reports: bool = True
    is_open: bool = True


@dataclass(eq=False)
class Given:
    """What the outermost running call of a model was given, and the text model inside may not be.

    Args:
        planners: Planners of the text models inside.
        model: The model.
        arguments: Its arguments by name.
        outer: The call of another model that it is nested in.
    """

    planners: Sequence[object] | None
    model: object
    arguments: Mapping[str, Any]
    outer: "Given | None" = None


_GENERATION: ContextVar[Generation | None] = ContextVar("hf_rope_ext.generation")


class _Running(threading.local):
    """What runs in this thread, and in this context."""

    call: Call | None = None
    given: Given | None = None
    # the innermost generation, or this object itself if there was none: ``get`` takes a default.
    # Before torch 2.14 the compiler cannot trace ``get``, but reads a property made of C code
    # and guards on its value.
    announced: Any = property(_GENERATION.get)


RUNNING = _Running()

_Entry = TypeVar("_Entry", Call, Generation, Given)


def innermost(entry: _Entry | None, planner: object) -> _Entry | None:
    """Return the innermost of nested entries that is for a planner; None if there is none."""
    while entry is not None:
        planners = entry.planners
        if planners is None or any(one is planner for one in planners):
            return entry
        entry = entry.outer
    return None


def announced_generation() -> Generation | None:
    """Return the innermost generation of this context."""
    generation: Any = RUNNING.announced
    if generation is RUNNING:
        return None
    while generation is not None and not generation.is_open:
        generation = generation.outer
    return generation  # type: ignore[no-any-return]


@contextmanager
def announce(generation: Generation) -> Iterator[None]:
    """Let a generation run for the duration of a ``with`` block; blocks may overlap."""
    generation.outer = announced_generation()
    _GENERATION.set(generation)
    try:
        yield
    finally:
        generation.is_open = False
        _GENERATION.set(announced_generation())
