"""Let the plan on a cache follow what is done to its rows.

transformers reorders, repeats and selects the rows of a cache, and empties it, by methods of the
cache, which know nothing of plans. A cache with a plan gets these methods as attributes of its own;
each calls the one of its class and does the same to the plan.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.models import host
from hf_rope_ext.rotary.request_plan import CachePlan, plan_of

NOTE = "hf_rope_ext_note"
"""Attribute of a cache for what a vision-language model notes of the positions in it."""

NAMES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset")
"""Methods of a cache that move or empty its rows."""


def attach_plan(cache: Any, plan: CachePlan | None) -> None:
    """Put a plan on a cache, or take it off, and let it follow the rows."""
    own = host.self_attention_cache(cache)
    own.hf_rope_ext_plan = plan
    if torch.compiler.is_compiling():
        return  # the next call outside compiled code makes up for it
    for name in NAMES:
        if hasattr(type(own), name) and name not in vars(own):
            setattr(own, name, _Follower(own, name))


class _Follower:
    """A method of one cache that moves its plan too."""

    __slots__ = ("cache", "name")  # nothing for those who walk over a cache's attributes

    def __init__(self, cache: Any, name: str) -> None:
        # weak: a cycle would keep gigabytes until the garbage collector runs
        self.cache = weakref.ref(cache)
        self.name = name

    def __reduce__(self) -> tuple[type, tuple[Any, str]]:
        """Copy and pickle it as the method of the cache's copy."""
        return type(self), (self.cache(), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do it to the cache and to its plan."""
        cache: Any = self.cache()
        rows = host.row_count(cache)
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        plan = plan_of(cache)
        if plan is None:
            return result
        if self.name == "reset":
            cache.hf_rope_ext_plan = None
        else:
            (change,) = (*args, *kwargs.values())
            _move_rows(plan, change)
            note = {
                name: _move(_repeat(value, rows), 0, change)
                for name, value in getattr(cache, NOTE, {}).items()
            }
            setattr(cache, NOTE, note)
        return result


def _move_rows(plan: CachePlan, change: Tensor | int) -> None:
    """Select rows of a plan, or repeat each row."""
    plan.lengths = _move(plan.lengths, 0, change)
    plan.positions = _move(plan.positions, -2, change)
    plan.frequencies = {
        # rows are the last but two of the frequencies, and the first of the scaling
        key: (
            _move(inv_freq, -3, change) if inv_freq.ndim > 2 else inv_freq,
            _move(scaling, 0, change),
        )
        for key, (inv_freq, scaling) in plan.frequencies.items()
    }


def _move(values: Any, dim: int, change: Tensor | int) -> Any:
    if not isinstance(values, Tensor) or values.ndim < abs(dim) or values.shape[dim] == 1:
        return values  # one row stands for all
    if isinstance(change, int):
        return values.repeat_interleave(change, dim=dim)
    return values.index_select(dim, change.to(values.device))


def _repeat(value: Any, rows: int | None) -> Any:
    """Return a value by row for each of its beams."""
    if not isinstance(value, Tensor) or value.ndim < 2 or not rows:
        return value
    return value.repeat_interleave(max(rows // value.shape[0], 1), dim=0)
