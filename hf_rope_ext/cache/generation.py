"""The final length of a request, as `generate` knows it, or `planned` for a hand-written loop."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from hf_rope_ext.attention.change import BandedAttention
from hf_rope_ext.cache.followers import attach_plan
from hf_rope_ext.cache.given import Keep, can_refill
from hf_rope_ext.cache.learned_prefix import prefix_changes, prompt_learning
from hf_rope_ext.cache.planner import Planner, require_no_empty_row
from hf_rope_ext.cache.repeated import Repeat
from hf_rope_ext.changes import AddHooks, Change, StandIn
from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.models import host
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.rotary.installed import SwapRotary
from hf_rope_ext.rotary.request_plan import CachePlan, plan_of, row_lengths
from hf_rope_ext.rotary.running import Generation, announce, announced_generation


class Generate(StandIn):
    """Stands in for ``generate``, so that the planner knows about it.

    Args:
        model: The model that generates.
        planners: The planners of its text models.
    """

    name = "generate"

    def __init__(self, model: nn.Module, planners: Sequence[Planner]) -> None:
        super().__init__(model)
        self.planners = planners

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        kwargs = host.with_cache_named(kwargs, host.cache_argument(type(self.model).forward))
        models = frozenset({id(self.model), id(kwargs.get("assistant_model"))})
        generation = Generation(
            input_ids=ids, arguments=kwargs, models=models, planners=self.planners
        )
        with announce(generation), prompt_learning(self.model, generation):
            return self.stock(*args, **kwargs)


class PrepareCache(StandIn):
    """Stands in for transformers' cache preparation, where the request's length is known."""

    name = host.PREPARE_CACHE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare the cache and record the length of the request."""
        result = self.stock(*args, **kwargs)
        generation = announced_generation()
        if generation is not None and id(self.model) in generation.models:
            request = host.GenerateRequest.from_call(self.__signature__, args, kwargs)
            _prepare(self.model, generation, request)
        return result


class RefuseContinuous(StandIn):
    """Stands in for a method that serves many requests in one paged cache.

    Args:
        model: The model.
        name: The method.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        self.name = name  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        raise RopeError(
            f"{self.name} keeps the rows of all requests in one paged cache, where a "
            f"length-dependent method cannot give each its own frequencies; call generate, or "
            f"patch with a static method such as 'yarn'."
        )


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
    attention: list[Change] = []
    planners: dict[int, list[Planner]] = {}
    outer: dict[int, nn.Module] = {}
    for around in innermost_models(model, [swap.module.path for swap in swaps]):
        inner = around[0]
        parts = set(inner.modules())
        own = [swap for swap in swaps if swap.parents & parts]
        planner = Planner(inner, [swap.module for swap in own])
        for rotary in planner.rotaries:
            rotary.planner = planner
        changes.append(AddHooks(inner, planner.begin, planner.end))
        # what stands inside the layers, which a checkpointed backward pass calls once more
        repeat = Repeat(planner)
        changes += map(repeat.on, {parent for swap in own for parent in swap.parents} - {inner})
        if planner.needs_positions:
            planner.attention = BandedAttention(inner, planner.rotaries, beside=repeat.on)
            attention.append(planner.attention)
        for part in around:
            outer[id(part)] = part
            planners.setdefault(id(part), []).append(planner)
    for part in outer.values():
        keep = Keep(part, planners[id(part)])
        changes.append(AddHooks(part, keep.begin, keep.end))
        if host.generates(part):
            changes += _generating_changes(part, planners[id(part)])
    return [*changes, *prefix_changes(model), *attention]


def _generating_changes(part: nn.Module, planners: Sequence[Planner]) -> list[Change]:
    """Return the changes to a model that generates."""
    if not host.GenerateRequest.is_known(type(part)):
        raise UnsupportedModelError(
            f"generate of {type(part).__name__} prepares its cache in an unknown way in "
            f"{host.describe_release()}, so a request cannot be planned; nothing was changed."
        )
    refusals = [RefuseContinuous(part, name) for name in host.CONTINUOUS if hasattr(part, name)]
    # a method that the user has put on the instance stays
    return [
        stand_in.change()
        for stand_in in (Generate(part, planners), PrepareCache(part), *refusals)
        if stand_in.name not in vars(part)
    ]


@contextmanager
def planned(max_length: int) -> Iterator[None]:
    """Plan the calls in a ``with`` block for this many tokens, as ``generate`` does for its own.

    For hand-written loops with a length-dependent method: a cache filled in the block is planned
    for the whole loop, so that cached decoding equals the full forward. It holds for the models
    called in this context, whatever else runs in the thread, and a cache keeps its plan after the
    block.

    Args:
        max_length: Final number of tokens of the longest row: prompt, padding and new tokens.

    Raises:
        RopeError: If it is not a positive integer.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise RopeError(f"max_length must be a positive integer, in tokens, got {max_length!r}.")
    with announce(Generation(max_length=max_length)):
        yield


def _prepare(model: nn.Module, generation: Generation, request: host.GenerateRequest) -> None:
    """Record the length of a request, and make sure that a cache passed in can serve it."""
    cache = host.given_cache(request.arguments)
    plan = plan_of(cache)
    seen = 0 if cache is None else int(host.self_attention_cache(cache).get_seq_length())
    has_whole_text = request.has_whole_text(generation.input_ids)
    length = request.length + (0 if has_whole_text else seen)
    outer = generation.outer
    if outer is not None and (not outer.models or outer.models & generation.models - {id(None)}):
        # in a block of `planned`; or an assistant, which drafts for the model that called it
        length = max(length, outer.max_length or 0)
    generation.max_length = length
    ids = generation.input_ids
    covered = None if request.positions is None else request.positions.shape[-1]
    if ids is not None and not has_whole_text and covered == ids.shape[1]:
        covered += seen  # positions of the new tokens alone
    generation.lengths = lengths = _final_lengths(generation, request, length - (covered or 0))
    chunk, mask = request.config.prefill_chunk_size, request.arguments.get("attention_mask")
    if chunk is not None and generation.virtual_tokens:
        raise RopeError(
            f"prefill_chunk_size={chunk} with the {generation.virtual_tokens} virtual tokens of an "
            f"adapter, which PEFT adds to every chunk; leave prefill_chunk_size out."
        )
    if chunk is not None and lengths is None:
        require_no_empty_row(mask if mask is None else mask[:, :chunk])
    if plan is None:
        return
    if seen:
        outgrows = length > plan.capacity
        if lengths is not None and plan.lengths is not None:
            known = plan.lengths.to(lengths.device).clamp(min=plan.trained)
            outgrows = bool((lengths > known).any())
        planners: Any = generation.planners
        outgrows = outgrows and any(planner.follows for planner in planners)
        generation.outgrows = outgrows
        if outgrows and has_whole_text and can_refill(plan, generation.arguments):
            positions = request.positions_of_text(model, ids, generation.arguments)
            if positions is None or _agree(plan, positions, mask, seen):
                host.empty_cache(cache)  # refilled under a longer plan, which is exact
                generation.outgrows = False
                if positions is not None:
                    request.arguments["position_ids"] = positions
        plan.capacity = max(plan.capacity, 0 if outgrows else length)
    if not int(host.self_attention_cache(cache).get_seq_length()):
        attach_plan(cache, None)


def _final_lengths(
    generation: Generation, request: host.GenerateRequest, new_tokens: int
) -> Tensor | None:
    """Return the final length of each row in positions, if ``generate`` has prepared positions."""
    positions, mask = request.positions, request.arguments.get("attention_mask")
    planners: Any = generation.planners
    axes = max(planner.axes for planner in planners)
    if positions is None or (axes > 1 and positions.ndim < 3):
        return None
    if positions.ndim == 3:
        positions = positions[-axes:]
    if mask is not None and mask.shape[-1] != positions.shape[-1]:
        mask = None
    ahead = new_tokens + generation.virtual_tokens
    return row_lengths(positions, mask, ahead, from_last=True)


def _agree(plan: CachePlan, positions: Tensor, mask: Tensor | None, seen: int) -> bool:
    """Return whether the tokens of a cache are where those of a text begin."""
    if plan.positions is None:
        return True
    held = plan.positions[..., :seen]
    axes = held.shape[0] if held.ndim == 3 else 1
    expected = positions[..., :seen].to(held.device)
    differ = held != (expected[-axes:] if expected.ndim == 3 else expected)
    if mask is not None:
        differ = differ & (mask[:, :seen].to(held.device) != 0)
    return not bool(differ.any())
