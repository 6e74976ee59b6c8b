"""Give each request its plan, and each cache the plan of the request that filled it.

A text model with a length-dependent method gets two forward hooks that hold the plan of a call
while it runs; the models around it get a `generate` that knows the length of its request. Both are
attributes of the patched model, not of its class.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.attention.change import BandedAttention
from hf_rope_ext.cache.asked import Asked, shape_of
from hf_rope_ext.cache.followers import attach_plan
from hf_rope_ext.cache.given import padding_mask
from hf_rope_ext.cache.learned_prefix import is_learned
from hf_rope_ext.cache.repeated import is_backward, recall, remember
from hf_rope_ext.cache.rerotation import KeyLayout, read_layout, turn_keys
from hf_rope_ext.errors import RopeError
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.models import host
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.pairs import position_axes
from hf_rope_ext.rotary.request_plan import CachePlan, plan_of, row_lengths
from hf_rope_ext.rotary.running import (
    RUNNING,
    Call,
    Generation,
    announced_generation,
    innermost,
)


class Planner:
    """The forward hooks of one text model.

    Args:
        model: The text model.
        rotaries: Its rotary embeddings.
    """

    def __init__(self, model: nn.Module, rotaries: list[ExtendedRotary]) -> None:
        rotation = next(iter(rotaries[0].rotations.values()))
        self.rotaries = rotaries
        self.policy = rotation.policy
        self.method = repr(rotation.method)
        self.follows = rotation.method.length_dependent
        self.rotates_anew = rotation.method.frequencies_follow
        self.needs_positions = attention_rules(rotation.method) is not None
        self.trained = rotation.geometry.original_max_position_embeddings
        self.axes = max(map(position_axes, rotaries))
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.cache_name = host.cache_argument(model.forward)
        self.layout: KeyLayout | None = None
        self.attention: BandedAttention | None = None

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find or make the plan of a call (forward pre-hook).

        Returns:
            Its arguments, with a cache under the name that the model knows.

        Raises:
            RopeError: If the cache was filled under another plan, or has outgrown its own and the
                policy forbids that; or if somebody has replaced the attention.
        """
        if self.attention is not None:
            self.attention.require_in_force()
        kwargs = host.with_cache_named(kwargs, self.cache_name)
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        repeated = recall(arguments.values()) if is_backward() else None
        call = self._call(model, arguments) if repeated is None else repeated
        call.owner, call.planners, call.outer = self, (self,), RUNNING.call
        RUNNING.call = call
        return args, kwargs

    def end(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Hand the plan to the cache that the call made, and report it (forward hook).

        It also runs after a forward that raised; there is no output then.
        """
        call = RUNNING.call
        if call is None or call.owner is not self:
            return  # `begin` raised
        RUNNING.call = call.outer
        if output is None or call.plan.lengths is None:
            return
        cache = host.output_cache(output)
        if cache is not None and plan_of(cache) is None:
            attach_plan(cache, call.plan)
        generation = self._generation()
        if not torch.compiler.is_compiling():
            # in every call, so that inputs never carry the plan of an earlier one
            if model.training or torch.is_grad_enabled():
                remember((*args, *kwargs.values()), call)
            report = self.policy.on_plan if generation is None or generation.reports else None
            if report is not None and call.is_new:
                report(call.plan.report())

    def _generation(self) -> Generation | None:
        return innermost(announced_generation(), self) if self.cache_name else None

    def _call(self, model: nn.Module, arguments: Mapping[str, Any]) -> Call:
        cache = host.given_cache(arguments)
        if cache is not None and host.is_paged(cache):
            raise RopeError(
                f"{self.method} cannot serve a paged cache, in which the rows of all requests are "
                f"one; use generate, or a static method."
            )
        if cache is not None and torch.compiler.is_exporting():
            raise RopeError(
                f"{self.method} plans each request, and an exported program would keep the plan of "
                f"its sample in every later one; patch with a static method such as 'yarn' first."
            )
        rows, tokens = shape_of(arguments)
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = padding_mask(innermost(RUNNING.given, self), decodes=bool(self.cache_name))
        positions = arguments.get("position_ids")
        asked = Asked(rows, tokens, positions, mask, self._generation())
        if cache is None:
            return self._first(None, asked)
        seen = host.self_attention_cache(cache).get_seq_length()
        plan = plan_of(cache)
        if isinstance(seen, Tensor):  # a cache of fixed size: it cannot outgrow its plan
            if plan is None or plan.lengths is None:
                # a cache that was only initialised in advance is still empty
                if not torch.compiler.is_compiling() and int(seen):
                    raise _unknown(self.method, int(seen))
                return self._first(cache, asked)
        elif seen == 0:
            return self._first(cache, asked)
        if plan is None:
            return self._first_after(cache, asked, int(seen))
        self._require_own(plan, rows)
        if plan.is_fixed:
            self._require_room(plan, asked)
            slots = None if plan.positions is None else plan.positions.shape[-1]
            # the cache counts on in the tensor that it gave
            return Call(plan, seen=torch.clone(torch.as_tensor(seen)), slots=slots, is_new=False)
        grows = self._outgrows(plan, asked, seen) and plan.policy.on_growth != "freeze"
        if grows:
            self._grow(model, cache, plan, asked, seen)
        if not torch.compiler.is_compiling() and plan.is_compiled:
            attach_plan(cache, plan)
            plan.is_compiled = False
        return Call(plan, seen=seen, records=plan.positions is not None, is_new=grows)

    def _require_own(self, plan: CachePlan, rows: int) -> None:
        """Check that the plan on a cache is of this method and for as many rows."""
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

    def _require_room(self, plan: CachePlan, asked: Asked) -> None:
        """Check that a call does not go beyond the plan of its cache of fixed size."""
        if not self.follows:
            return
        outgrows = asked.generation is not None and asked.generation.outgrows
        if plan.policy.on_growth != "freeze" and (outgrows or self._leaps(plan, asked, 0, None)):
            raise RopeError(
                f"the positions of this request go beyond those that the cache of fixed size was "
                f"planned for under {self.method}; nothing was changed. Fill a new cache with all "
                f"tokens at once."
            )

    def _outgrows(self, plan: CachePlan, asked: Asked, seen: int) -> bool:
        """Return whether a call needs a longer plan than its cache has."""
        if not self.follows:
            return False
        generation = asked.generation
        if generation is not None and generation.models:
            # what is drafted beyond the last token is dropped again
            return generation.outgrows or seen > plan.capacity
        needed = seen + asked.tokens
        left = max(plan.capacity - needed, 0)
        return needed > plan.capacity or self._leaps(plan, asked, left, seen)

    def _leaps(self, plan: CachePlan, asked: Asked, left: int, seen: int | None) -> bool:
        """Return whether positions go beyond the plan, for all that tokens do not.

        A video can take more positions than tokens, and positions of text may be passed. A single
        token is not checked: it continues from the tokens before it, and looking at it would
        synchronize with the device.

        Args:
            plan: The plan of the cache.
            asked: The call.
            left: Number of tokens that the plan has room for after this call.
            seen: Number of tokens in the cache; None if only the device knows it.
        """
        positions = asked.positions
        if positions is None or positions.shape[-1] == 1:
            return False
        mask = None if seen is None else asked.mask_after(seen)
        lengths = row_lengths(self._own_axes(positions), mask, left)
        assert plan.lengths is not None
        known = plan.lengths.to(lengths.device).clamp(min=plan.trained)
        return bool((lengths > known).any())

    def _own_axes(self, positions: Tensor) -> Tensor:
        """Return positions without the axis that some families put in front, to build masks."""
        return positions[-self.axes :] if positions.ndim == 3 else positions

    def _first(self, cache: Any, asked: Asked, seen: int = 0) -> Call:
        """Return the first call of a request, which makes its plan.

        Args:
            cache: The cache that it fills, if any.
            asked: The call.
            seen: Number of tokens that the cache already holds.
        """
        generation, limit = asked.generation, asked.limit
        own = None if cache is None else host.self_attention_cache(cache)
        size = None if own is None else host.fixed_size(own)
        needed = seen + asked.tokens
        capacity = max(limit or size or 0, needed)
        lengths = None if generation is None else generation.lengths
        if lengths is not None and lengths.shape[0] not in (1, asked.rows):
            lengths = None
        mask = asked.mask_after(seen)
        if capacity > needed and lengths is None:
            require_no_empty_row(mask)
        plan = CachePlan(self.method, self.trained, self.policy, capacity)
        plan.is_compiled, plan.is_fixed = torch.compiler.is_compiling(), size is not None
        if cache is not None:
            attach_plan(cache, plan)
        return Call(
            plan,
            seen=seen,
            ahead=capacity - needed,
            mask=mask,
            lengths=lengths,
            size=None if limit else size,
            slots=size if self.needs_positions else None,
            records=size is None,
        )

    def _first_after(self, cache: Any, asked: Asked, seen: int) -> Call:
        """Return the first call on a cache that was filled without a plan.

        Raises:
            RopeError: If its keys may be rotated by other angles than those of the request.
        """
        if is_learned(cache):
            call = self._first(cache, asked, seen)
            call.plan.learned = seen
            return call
        beyond = max(asked.limit or 0, seen + asked.tokens) > self.trained
        if self.needs_positions or self.axes > 1 or beyond:
            raise _unknown(self.method, seen)
        # within the trained length every plan is that of the unpatched model
        call = self._first(cache, asked, seen)
        call.records, call.plan.unknown = False, seen
        return call

    def _grow(self, model: nn.Module, cache: Any, plan: CachePlan, asked: Asked, seen: int) -> None:
        """Extend the plan of a cache and rotate its keys accordingly.

        Raises:
            RopeError: If it goes beyond the trained length, within which all plans agree, and the
                policy forbids that or the positions of the keys are not known.
        """
        if plan.positions is not None:
            plan.positions = plan.positions[..., :seen]  # the cache may have been cropped
        lengths, capacity = self._longer(plan, asked, seen)
        is_beyond = bool((lengths > self.trained).any())
        if is_beyond and plan.policy.on_growth == "error":
            raise self._outgrown(plan, asked, seen)
        if is_beyond and plan.unknown:
            raise _unknown(self.method, plan.unknown)
        frequencies = {
            key: rotary.frequencies_at(key, lengths)
            for rotary in self.rotaries
            for key in rotary.names()
            if key in plan.frequencies
        }
        if is_beyond and self.rotates_anew:
            if self.layout is None:
                self.layout = read_layout(model, self.rotaries)
            turn_keys(host.self_attention_cache(cache), self.layout, plan, frequencies)
        plan.frequencies, plan.lengths, plan.capacity = frequencies, lengths, capacity
        if asked.generation is not None:
            asked.generation.outgrows = False

    def _outgrown(self, plan: CachePlan, asked: Asked, seen: int) -> RopeError:
        more = f"{max(asked.limit or 0, seen + asked.tokens)}"
        if asked.positions is not None:
            last = row_lengths(self._own_axes(asked.positions), asked.mask_after(seen)).max()
            more += f", at positions up to {int(last) - 1}"
        return RopeError(
            f"the cache was planned for {plan.capacity} tokens under {self.method}, and this call "
            f"needs room for {more}; nothing was changed. Run the loop in `planned(max_length)`, "
            f"fill a new cache with all tokens, or patch with on_growth='rerotate'."
        )

    def _longer(self, plan: CachePlan, asked: Asked, seen: int) -> tuple[Tensor, int]:
        """Return the row lengths and the capacity of a plan that has room for a call."""
        assert plan.lengths is not None
        generation, limit, needed = asked.generation, asked.limit, seen + asked.tokens
        if generation is not None and generation.lengths is not None:
            lengths = generation.lengths.to(plan.lengths.device)
            return torch.maximum(lengths, plan.lengths), max(limit or 0, needed)
        positions, mask = asked.positions, asked.mask_after(seen)
        if positions is None:
            steps = torch.arange(1, asked.tokens + 1, device=plan.lengths.device)
            held = plan.positions
            positions = steps[None] + (seen - 1 if held is None else held[..., -1:])
        positions = self._own_axes(positions)
        now = row_lengths(positions, mask).to(plan.lengths.device)
        if limit:
            longer = row_lengths(positions, mask, max(limit - needed, 0)).to(now.device)
            return torch.maximum(longer, plan.lengths), max(limit, needed)
        lengths = torch.maximum(plan.policy.grow(now, self.trained), plan.lengths)
        return lengths, needed + int((lengths - now).min())


def require_no_empty_row(mask: Tensor | None) -> None:
    """Check that each row has a token in the first chunk of a request, which makes its plan.

    Args:
        mask: The padding mask of the chunk, ``(batch, seq)``, if there is one.

    Raises:
        RopeError: If a row has not: how long it will be is not known then.
    """
    if mask is None or torch.compiler.is_compiling():
        return
    empty = (mask == 0).all(dim=-1)
    if bool(empty.any()):
        raise RopeError(
            f"row {int(empty.int().argmax())} has nothing but padding in the first "
            f"{mask.shape[-1]} tokens of its request, so its length is not known yet; nothing was "
            f"changed. Fill the cache in longer chunks."
        )


def _unknown(method: str, tokens: int) -> RopeError:
    return RopeError(
        f"the cache holds {tokens} tokens that were not computed under {method}, and this request "
        f"needs them so; nothing was changed. Fill a new cache. If they are the learned prefix of "
        f"an adapter, patch the PeftModel instead of its base model."
    )
