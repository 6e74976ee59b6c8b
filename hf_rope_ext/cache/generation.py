"""The final length of a request, as `generate` knows it, or `planned` for a hand-written loop."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from hf_rope_ext.cache.planner import Planner
from hf_rope_ext.changes import AddHooks, Change, StandIn
from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.models import host
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.rotary.installed import SwapRotary
from hf_rope_ext.rotary.request_plan import RUNNING, CachePlan, Generation, plan_of


class Generate(StandIn):
    """Stands in for ``generate``, so that the planner knows about it."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        kwargs = host.with_cache_named(kwargs, host.cache_argument(type(self.model).forward))
        with _generating(Generation(input_ids=ids, outer=RUNNING.generation)):
            return self.stock(*args, **kwargs)


class PrepareCache(StandIn):
    """Stands in for transformers' cache preparation, where the request's length is known."""

    name = host.PREPARE_CACHE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the cache and record the length of the request."""
        result = self.stock(*args, **kwargs)
        _prepare(host.GenerateRequest.from_call(self.__signature__, args, kwargs))
        return result


class KeepCache(StandIn):
    """Stands in for the preparation of a call, where some models drop their cache.

    They do so because stock LongRoPE switches frequencies at the trained length; those of a patched
    model stay for the life of a cache.
    """

    name = host.PREPARE_INPUTS

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the arguments."""
        settings = vars(self.model.config)
        trained = settings[host.TRAINED_LENGTH]
        settings[host.TRAINED_LENGTH] = sys.maxsize
        try:
            return self.stock(*args, **kwargs)
        finally:
            settings[host.TRAINED_LENGTH] = trained


def cache_changes(model: nn.Module, swaps: Sequence[SwapRotary]) -> list[Change]:
    """Return the changes that make a model keep its cache beyond the trained length."""
    around = chain(*innermost_models(model, [swap.module.path for swap in swaps]))
    return [
        KeepCache(part).change()
        for part in {id(part): part for part in around}.values()
        if KeepCache.name not in vars(part)
        and host.TRAINED_LENGTH in vars(part.config)
        and host.switches_frequencies(part)
    ]


def planning_changes(model: nn.Module, swaps: Sequence[SwapRotary]) -> list[Change]:
    """Return the changes that make a model's text models plan their requests.

    Args:
        model: The model.
        swaps: Its new rotary modules.

    Raises:
        UnsupportedModelError: If the installed transformers prepares caches differently.
    """
    changes: list[Change] = []
    generating: dict[int, nn.Module] = {}
    for around in innermost_models(model, [swap.module.path for swap in swaps]):
        inner = around[0]
        parts = set(inner.modules())
        rotaries = [swap.module for swap in swaps if swap.parents & parts]
        planner = Planner(inner, rotaries)
        changes.append(AddHooks(inner, planner.begin, planner.end))
        generating |= {id(part): part for part in around if host.generates(part)}
    for part in generating.values():
        if not host.GenerateRequest.is_known(type(part)):
            raise UnsupportedModelError(
                f"generate of {type(part).__name__} prepares its cache in an unknown way in "
                f"{host.describe_release()}, so a request cannot be planned; nothing was changed."
            )
        # a method that the user has put on the instance stays
        changes += [
            stand_in(part).change()
            for stand_in in (Generate, PrepareCache)
            if stand_in.name not in vars(part)
        ]
    return changes


@contextmanager
def planned(max_length: int) -> Iterator[None]:
    """Plan the calls in a ``with`` block for this many tokens, as ``generate`` does for its own.

    For hand-written loops with a length-dependent method: a cache filled in the block is planned
    for the whole loop, so that cached decoding equals the full forward.

    Args:
        max_length: Final number of tokens of the longest row: prompt, padding and new tokens.

    Raises:
        RopeError: If it is not a positive integer.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise RopeError(f"max_length must be a positive integer, in tokens, got {max_length!r}.")
    with _generating(Generation(max_length=max_length)):
        yield


@contextmanager
def _generating(generation: Generation) -> Iterator[None]:
    outer = RUNNING.generation
    RUNNING.generation = generation
    try:
        yield
    finally:
        RUNNING.generation = outer


def _prepare(request: host.GenerateRequest) -> None:
    """Record the length of a request, and make sure that a cache passed in can serve it."""
    generation = RUNNING.generation
    if generation is None:
        return
    # an assistant drafts no further than the model it drafts for
    outer = generation.outer.max_length if generation.outer is not None else None
    generation.max_length = length = max(request.length, outer or 0)
    chunk, mask = request.config.prefill_chunk_size, request.arguments.get("attention_mask")
    if chunk is not None and mask is not None and not mask[:, :chunk].any(dim=-1).all():
        raise RopeError(
            f"prefill_chunk_size={chunk} gives a row of the batch nothing but padding in its first "
            f"chunk, so its length is not known yet; use longer chunks."
        )
    cache = host.given_cache(request.arguments)
    plan = plan_of(cache)
    if plan is None:
        return
    seen = int(host.self_attention_cache(cache).get_seq_length())
    if seen and not request.has_whole_text(generation.input_ids):
        generation.max_length = seen + length
    elif (
        seen and length > max(plan.capacity, plan.trained) and _can_refill(plan, request.arguments)
    ):
        host.empty_cache(cache)  # refilled from the whole text under a longer plan, which is exact
        seen = 0
    if not seen:
        cache.hf_rope_ext_plan = None


def _can_refill(plan: CachePlan, model_kwargs: Mapping[str, Any]) -> bool:
    """Return whether a cache can be refilled: not if it holds images that were not passed again."""
    passed_again = any(
        name.startswith("pixel_values") and model_kwargs[name] is not None for name in model_kwargs
    )
    return passed_again or plan.has_images is None or not bool(plan.has_images)
