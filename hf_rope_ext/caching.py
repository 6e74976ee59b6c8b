"""Give each request its plan, and each cache the plan of the request that filled it.

A text model with a length-dependent method gets two forward hooks, which say for the duration of a
call what it is planned for, and the models around it that can generate get a `generate` that says
how long the request will be. Both are attributes of the model patched, not of its class.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.families import innermost_models
from hf_rope_ext.lengths import RUNNING, Call, Generation, Plan, plan_of, row_lengths
from hf_rope_ext.rerotation import KeyLayout, axes, read_layout, turn_keys
from hf_rope_ext.rotary import ExtendedRotary

CACHES = ("past_key_values", "cache_params")
PREPARES = "_prepare_cache_for_generation"


class Planner:
    """What the hooks of one text model share.

    Args:
        model: The text model.
        rotaries: Its rotary embeddings.
    """

    def __init__(self, model: nn.Module, rotaries: list[ExtendedRotary]) -> None:
        rotation = next(iter(rotaries[0].rotations.values()))
        self.rotaries = rotaries
        self.policy = rotation.policy
        self.method = repr(rotation.method)
        self.trained = rotation.geometry.original_max_position_embeddings
        self.axes = max(map(axes, rotaries))
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.cache_name = next((name for name in CACHES if name in self.parameters), None)
        self.layout: KeyLayout | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find or make the plan of a call.

        Raises:
            RopeError: If the cache was filled under another plan, or has outgrown its own where
                that is an error.
        """
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if given.get("cache") is not None:
            raise RopeError(
                f"{self.method} cannot serve a paged cache, in which the rows of all requests are "
                f"one; use generate, or a static method."
            )
        cache = given.get(self.cache_name) if self.cache_name else None
        call = self._call(model, cache, given.get("position_ids"), *_shape(given))
        call.owner, call.outer = self, RUNNING.call
        RUNNING.call = call

    def end(self, output: Any) -> None:
        """Hand the plan over to the cache that the call made, and report it."""
        call = RUNNING.call
        if call is None or call.owner is not self:
            return  # `begin` raised
        RUNNING.call = call.outer
        if output is None or call.plan.lengths is None:
            return
        cache = _cache_of(output)
        if cache is not None and plan_of(cache) is None:
            cache.hf_rope_ext_plan = call.plan
        report = self.policy.on_plan
        if report is not None and call.is_new and not torch.compiler.is_compiling():
            report(call.plan.report())

    def _call(
        self, model: nn.Module, cache: Any, positions: Tensor | None, rows: int, tokens: int
    ) -> Call:
        generation = RUNNING.generation if self.cache_name else None
        limit = generation.max_length if generation is not None else None
        if cache is None:
            return self._first(None, tokens, limit)
        seen = _own(cache).get_seq_length()
        plan = plan_of(cache)
        if isinstance(seen, Tensor):  # a cache of fixed size, which cannot outgrow its plan
            if plan is None or plan.lengths is None:
                # one that was made ready beforehand is still empty
                if not torch.compiler.is_compiling() and int(seen):
                    raise _unknown(self.method, int(seen))
                return self._first(cache, tokens, limit)
        elif seen == 0:
            return self._first(cache, tokens, limit)
        if plan is None:
            raise _unknown(self.method, int(seen))
        if plan.method != self.method:
            raise RopeError(
                f"the cache was filled under {plan.method}, but the model is patched with "
                f"{self.method}; fill a new cache."
            )
        assert plan.lengths is not None
        if plan.lengths.shape[0] not in (1, rows):
            raise RopeError(
                f"the cache was planned for {plan.lengths.shape[0]} rows, but {rows} came; fill a "
                f"new cache for another batch."
            )
        if isinstance(seen, Tensor):
            if self._beyond(plan, positions, left=0) is not None:
                raise RopeError(
                    f"the positions of this call go beyond those that the cache of fixed size was "
                    f"planned for under {self.method}; nothing was changed. Fill a new cache with "
                    f"all tokens at once."
                )
            return Call(plan, is_new=False)
        beyond = self._beyond(plan, positions, left=max(plan.capacity - seen - tokens, 0))
        outgrown = beyond is not None or seen + tokens > plan.capacity
        grows = outgrown and plan.policy.on_growth != "freeze"
        if grows:
            self._grow(model, cache, plan, seen + tokens, limit, beyond)
        return Call(plan, seen=seen, records=plan.positions is not None, is_new=grows)

    def _beyond(self, plan: Plan, positions: Tensor | None, left: int) -> Tensor | None:
        """Return the lengths of rows whose positions go beyond the plan, None where none do.

        A video can take more positions than tokens. A single token continues from those before it,
        so it is not looked at, which would wait for the device.

        Args:
            plan: The plan of the cache.
            positions: Of the call's tokens, before those of text are taken off in front.
            left: Tokens that the plan has room for after this call.
        """
        if positions is None or positions.ndim < 3 or positions.shape[-1] == 1 or self.axes == 1:
            return None
        lengths = row_lengths(positions[-self.axes :]) + left
        assert plan.lengths is not None
        known = plan.lengths.to(lengths.device)
        found = (lengths > known.clamp(min=plan.trained)).any()
        return torch.maximum(lengths, known) if bool(found) else None

    def _first(self, cache: Any, tokens: int, limit: int | None) -> Call:
        """Return the call that makes a plan."""
        size = None if cache is None or limit else _fixed_size(_own(cache))
        capacity = max(size or limit or 0, tokens)
        plan = Plan(self.method, self.trained, self.policy, capacity)
        if cache is not None:
            cache.hf_rope_ext_plan = plan
        grows = self.policy.on_growth == "rerotate" and size is None
        return Call(plan, ahead=capacity - tokens, size=size, records=grows)

    def _grow(
        self,
        model: nn.Module,
        cache: Any,
        plan: Plan,
        needed: int,
        limit: int | None,
        beyond: Tensor | None,
    ) -> None:
        """Plan a cache for more than it was planned for, and turn its keys accordingly."""
        if plan.policy.on_growth == "error":
            more = f"{needed}" if beyond is None else f"positions up to {int(beyond.max())}"
            raise RopeError(
                f"the cache was planned for {plan.capacity} tokens under {self.method}, and this "
                f"call needs {more}; nothing was changed. Run the loop in `planned(max_length)`, "
                f"fill a new cache with all tokens, or patch with on_growth='rerotate'."
            )
        assert plan.lengths is not None
        if plan.positions is not None:  # the cache may have been cut back
            plan.positions = plan.positions[..., : _own(cache).get_seq_length()]
        capacity = max(limit, needed) if limit else plan.policy.grown(needed, self.trained)
        capacity = max(capacity, plan.capacity)
        lengths = (plan.lengths if beyond is None else beyond) + (capacity - plan.capacity)
        frequencies = {
            key: rotary.frequencies_at(key, lengths)
            for rotary in self.rotaries
            for key in rotary.names()
            if key in plan.frequencies
        }
        if bool((lengths > self.trained).any()):  # up to there all plans are the same
            if self.layout is None:
                self.layout = read_layout(model, self.rotaries)
            turn_keys(_own(cache), self.layout, plan, frequencies)
        plan.frequencies, plan.lengths, plan.capacity = frequencies, lengths, capacity


class BeforeForward:
    """Forward pre-hook of a text model."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a call."""
        self.planner.begin(module, args, kwargs)


class AfterForward:
    """Forward hook of a text model; it also runs when the forward raised."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """End a call."""
        self.planner.end(output)


HOOKS = (BeforeForward, AfterForward)


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


def remove_hooks(model: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove the forward hooks of some kinds from a model and its parts."""
    for part in model.modules():
        for hooks, flags in (
            (part._forward_pre_hooks, (part._forward_pre_hooks_with_kwargs,)),
            (
                part._forward_hooks,
                (part._forward_hooks_with_kwargs, part._forward_hooks_always_called),
            ),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
                for held in (hooks, *flags):
                    held.pop(key, None)


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
    seen = int(_own(cache).get_seq_length())
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


def _can_refill(plan: Plan, model_kwargs: Mapping[str, Any]) -> bool:
    """Return whether a cache can be filled again: not where its images are not there any more."""
    given = any(
        name.startswith("pixel_values") and model_kwargs[name] is not None for name in model_kwargs
    )
    return given or plan.has_images is None or not bool(plan.has_images)


def _shape(given: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows of a call and their tokens."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "input_values"):
        if given.get(name) is not None:
            return given[name].shape[0], given[name].shape[1]
    return 1, 0


def _own(cache: Any) -> Any:
    """Return the part of a cache that self-attention fills."""
    return getattr(cache, "self_attention_cache", cache)


def _fixed_size(cache: Any) -> int | None:
    """Return the tokens a cache of fixed size has room for, None for one that grows."""
    from transformers.cache_utils import StaticLayer

    sizes = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    return max(sizes, default=None)


def _cache_of(output: Any) -> Any:
    """Return the cache in a model's output, None where there is none."""
    from transformers import Cache

    for name in CACHES:
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if isinstance(part, Cache)), None)


def _unknown(method: str, tokens: int) -> RopeError:
    return RopeError(
        f"the cache holds {tokens} tokens that were not computed under {method}; fill a new cache."
    )
