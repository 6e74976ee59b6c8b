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

from hf_rope_ext.cache.rerotation import KeyLayout, position_axes, read_layout, turn_keys
from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.request_plan import RUNNING, CachePlan, Call, plan_of, row_lengths


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
        self.trained = rotation.geometry.original_max_position_embeddings
        self.axes = max(map(position_axes, rotaries))
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.cache_name = host.cache_argument(model.forward)
        self.layout: KeyLayout | None = None

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find or make the plan of a call (forward pre-hook).

        Returns:
            Its arguments, with a cache under the name that the model knows.

        Raises:
            RopeError: If the cache was filled under another plan, or has outgrown its own and the
                policy forbids that.
        """
        kwargs = host.with_cache_named(kwargs, self.cache_name)
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = host.given_cache(arguments)
        if cache is not None and host.is_paged(cache):
            raise RopeError(
                f"{self.method} cannot serve a paged cache, in which the rows of all requests are "
                f"one; use generate, or a static method."
            )
        call = self._call(model, cache, arguments.get("position_ids"), *_shape(arguments))
        call.owner, call.outer = self, RUNNING.call
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
            cache.hf_rope_ext_plan = call.plan
        generation = RUNNING.generation
        report = self.policy.on_plan if generation is None or generation.reports else None
        if report is not None and call.is_new and not torch.compiler.is_compiling():
            report(call.plan.report())

    def _call(
        self, model: nn.Module, cache: Any, positions: Tensor | None, rows: int, tokens: int
    ) -> Call:
        generation = RUNNING.generation if self.cache_name else None
        limit = generation.max_length if generation is not None else None
        if cache is None:
            return self._first(None, tokens, limit)
        seen = host.self_attention_cache(cache).get_seq_length()
        plan = plan_of(cache)
        if isinstance(seen, Tensor):  # a cache of fixed size: it cannot outgrow its plan
            if plan is None or plan.lengths is None:
                # a cache that was only initialised in advance is still empty
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

    def _beyond(self, plan: CachePlan, positions: Tensor | None, left: int) -> Tensor | None:
        """Return the rows' new lengths if any position goes beyond the plan, else None.

        A video can take more positions than tokens. A single token is not checked: it continues
        from the tokens before it, and looking at it would synchronize with the device.

        Args:
            plan: The plan of the cache.
            positions: The call's positions, with the family's extra text axis in front, if any.
            left: Number of tokens that the plan has room for after this call.
        """
        if positions is None or positions.ndim < 3 or positions.shape[-1] == 1 or self.axes == 1:
            return None
        lengths = row_lengths(positions[-self.axes :]) + left
        assert plan.lengths is not None
        known = plan.lengths.to(lengths.device)
        outgrown = (lengths > known.clamp(min=plan.trained)).any()
        return torch.maximum(lengths, known) if bool(outgrown) else None

    def _first(self, cache: Any, tokens: int, limit: int | None) -> Call:
        """Return the first call of a request, which makes its plan."""
        size = None if cache is None or limit else host.fixed_size(host.self_attention_cache(cache))
        capacity = max(size or limit or 0, tokens)
        plan = CachePlan(self.method, self.trained, self.policy, capacity)
        if cache is not None:
            cache.hf_rope_ext_plan = plan
        grows = self.policy.on_growth == "rerotate" and size is None
        return Call(plan, ahead=capacity - tokens, size=size, records=grows)

    def _grow(
        self,
        model: nn.Module,
        cache: Any,
        plan: CachePlan,
        needed: int,
        limit: int | None,
        beyond: Tensor | None,
    ) -> None:
        """Extend the plan of a cache and rotate its keys accordingly."""
        if plan.policy.on_growth == "error":
            more = f"{needed}" if beyond is None else f"positions up to {int(beyond.max())}"
            raise RopeError(
                f"the cache was planned for {plan.capacity} tokens under {self.method}, and this "
                f"call needs {more}; nothing was changed. Run the loop in `planned(max_length)`, "
                f"fill a new cache with all tokens, or patch with on_growth='rerotate'."
            )
        assert plan.lengths is not None
        if plan.positions is not None:  # the cache may have been cropped
            held = host.self_attention_cache(cache).get_seq_length()
            plan.positions = plan.positions[..., :held]
        capacity = max(limit, needed) if limit else plan.policy.grow(needed, self.trained)
        capacity = max(capacity, plan.capacity)
        lengths = (plan.lengths if beyond is None else beyond) + (capacity - plan.capacity)
        frequencies = {
            key: rotary.frequencies_at(key, lengths)
            for rotary in self.rotaries
            for key in rotary.names()
            if key in plan.frequencies
        }
        if bool((lengths > self.trained).any()):  # within the trained length all plans agree
            if self.layout is None:
                self.layout = read_layout(model, self.rotaries)
            turn_keys(host.self_attention_cache(cache), self.layout, plan, frequencies)
        plan.frequencies, plan.lengths, plan.capacity = frequencies, lengths, capacity


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of rows of a call and of tokens in each."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "input_values"):
        if arguments.get(name) is not None:
            return arguments[name].shape[0], arguments[name].shape[1]
    return 1, 0


def _unknown(method: str, tokens: int) -> RopeError:
    return RopeError(
        f"the cache holds {tokens} tokens that were not computed under {method}; fill a new cache."
    )
