"""How long a request will be: told by `generate`, or by `planned` in a loop written by hand."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_rope_ext.cache.cache_parts import CACHES, self_attention_cache
from hf_rope_ext.cache.hooks import HOOKS, AfterForward, BeforeForward, remove_hooks
from hf_rope_ext.cache.planner import Planner
from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.models.find import innermost_models
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.request_plan import RUNNING, CachePlan, Generation, plan_of

PREPARES = "_prepare_cache_for_generation"


class Generate:
    """What stands in for ``generate`` and for transformers' preparation of its cache.

    Args:
        model: The model that generates.
        name: Name of the method stood in for.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.model), self.name).__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the class does, with the length of the request known to the planner."""
        method = getattr(type(self.model), self.name)
        if self.name == PREPARES:
            result = method(self.model, *args, **kwargs)
            given = inspect.signature(method).bind(self.model, *args, **kwargs).arguments
            _prepare(given["generation_config"], given["model_kwargs"], given["max_cache_length"])
            return result
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with _generating(Generation(input_ids=ids, outer=RUNNING.generation)):
            return method(self.model, *args, **kwargs)


def install(model: nn.Module, rotaries: Mapping[str, ExtendedRotary]) -> None:
    """Make the text models of a patched model plan their requests.

    Raises:
        UnsupportedModelError: If the installed transformers prepares caches in another way.
    """
    from transformers import GenerationMixin

    for around in innermost_models(model, rotaries):
        inner = around[0]
        own = list(inner.modules())
        planner = Planner(inner, [rotary for rotary in rotaries.values() if rotary in own])
        inner.register_forward_pre_hook(BeforeForward(planner), with_kwargs=True)
        inner.register_forward_hook(AfterForward(planner), with_kwargs=True, always_call=True)
        for outer in around:
            if not isinstance(outer, GenerationMixin):
                continue
            known = inspect.signature(getattr(type(outer), PREPARES, lambda: None)).parameters
            if not {"generation_config", "model_kwargs", "max_cache_length"} <= set(known):
                raise UnsupportedModelError(
                    f"{type(outer).__name__} does not prepare its cache as transformers 5.23 does, "
                    f"so a request cannot be planned; nothing was changed."
                )
            for name in ("generate", PREPARES):
                outer.__dict__.setdefault(name, Generate(outer, name))


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    remove_hooks(model, HOOKS)
    for part in model.modules():
        for name in ("generate", PREPARES):
            if isinstance(part.__dict__.get(name), Generate):
                del part.__dict__[name]


def is_installed(model: nn.Module) -> bool:
    """Return whether a model plans its requests."""
    return any(
        isinstance(hook, HOOKS) for part in model.modules() for hook in part._forward_hooks.values()
    )


@contextmanager
def planned(max_length: int) -> Iterator[None]:
    """Plan what runs in a ``with`` block for this many tokens, as ``generate`` does for its own.

    For loops written by hand with a length-dependent method: a cache filled in the block is planned
    for the whole loop, so that cached decoding equals the full forward.

    Args:
        max_length: Tokens of the longest row at the end, prompt, padding and new ones together.

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


def _prepare(config: Any, model_kwargs: Mapping[str, Any], max_cache_length: int) -> None:
    """Note how long a request will be, and make sure that a cache passed in can serve it."""
    generation = RUNNING.generation
    if generation is None:
        return
    # a drafting assistant writes no further than the model it drafts for
    outer = generation.outer.max_length if generation.outer is not None else None
    generation.max_length = length = max(max_cache_length + 1, outer or 0)
    chunk, mask = config.prefill_chunk_size, model_kwargs.get("attention_mask")
    if chunk is not None and mask is not None and not mask[:, :chunk].any(dim=-1).all():
        raise RopeError(
            f"prefill_chunk_size={chunk} gives a row of the batch nothing but padding in its first "
            f"chunk, so its length is not known yet; use longer chunks."
        )
    caches = [model_kwargs[name] for name in CACHES if model_kwargs.get(name) is not None]
    plan = plan_of(*caches) if caches else None
    if plan is None:
        return
    (cache,) = caches
    seen = int(self_attention_cache(cache).get_seq_length())
    # as transformers tells whether it was given the whole text or what is new of it
    tokens = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    whole = model_kwargs.get("inputs_embeds") is not None or (
        generation.input_ids is not None and generation.input_ids.shape[1] == tokens
    )
    if seen and not whole:
        generation.max_length = seen + length
    elif seen and length > max(plan.capacity, plan.trained) and _can_refill(plan, model_kwargs):
        cache.reset()  # filled again from the whole text, under a plan that covers it
        seen = 0
    if not seen:
        cache.hf_rope_ext_plan = None


def _can_refill(plan: CachePlan, model_kwargs: Mapping[str, Any]) -> bool:
    """Return whether a cache can be filled again: not where its images are not there any more."""
    given = any(
        name.startswith("pixel_values") and model_kwargs[name] is not None for name in model_kwargs
    )
    return given or plan.has_images is None or not bool(plan.has_images)
