"""Calls that a checkpointed backward pass repeats, which get the plan of the call they repeat.

Such a pass runs parts of a model once more, outside the forward that they were in and maybe in
another thread. The plan lies on the storage of their inputs, which is all that comes again. Where
two calls share an input before the backward pass of the first, the later one's plan lies on it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.changes import AddHooks
from hf_rope_ext.errors import RopeError
from hf_rope_ext.rotary.running import RUNNING, Call, innermost


class Repeat:
    """The forward hooks of a module that needs the plan of its call inside a layer.

    Args:
        planner: The planner of the text model around it.
    """

    def __init__(self, planner: object) -> None:
        self.planner = planner

    def on(self, module: nn.Module) -> AddHooks:
        """Return the change that puts the hooks on a module."""
        return AddHooks(module, self.begin, self.end)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the plan of a call, or bring it back (forward pre-hook).

        Raises:
            RopeError: If the plan of a repeated call is not known.
        """
        tensors = list(_tensors((*args, *kwargs.values())))
        running = innermost(RUNNING.call, self.planner)
        if running is not None:
            if module.training and not torch.compiler.is_compiling():
                remember(tensors, running)
        elif is_backward():
            repeated = recall(tensors)
            if repeated is None:
                raise RopeError(
                    f"{type(module).__name__} is repeated in a backward pass on other inputs than "
                    f"it had, so the plan of its request is not known; call the model in train() "
                    f"mode."
                )
            repeated.planners, repeated.outer = (self.planner,), RUNNING.call
            repeated.owner, RUNNING.call = self, repeated

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Leave a repeated call (forward hook)."""
        if RUNNING.call is not None and RUNNING.call.owner is self:
            RUNNING.call = RUNNING.call.outer


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments and in their tuples, such as cosines and sines."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def is_backward() -> bool:
    """Return whether this thread runs a backward pass, in which checkpointed calls are repeated."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def remember(tensors: Iterable[Any], call: Call) -> None:
    """Write the plan of a call on its inputs, from which a checkpointed part is repeated."""
    # without tensors that may be one of the inputs: a cycle that nothing could collect
    own = None if call.own is None else call.own.clone()
    plan = replace(call.plan, positions=own)
    repeated = Call(plan, seen=call.seen, own=own, is_noted=True, is_new=False)
    for tensor in tensors:
        if type(tensor) is Tensor:  # others, such as sharded ones, may have no storage
            # a repeated call may get other tensors, but on the same storage
            tensor.untyped_storage().hf_rope_ext_call = repeated  # type: ignore[attr-defined]


def recall(tensors: Iterable[Any]) -> Call | None:
    """Return what `remember` has written on any of these inputs, for a repeated call."""
    for tensor in tensors:
        if type(tensor) is Tensor:
            call: Call | None = getattr(tensor.untyped_storage(), "hf_rope_ext_call", None)
            if call is not None:
                return replace(call, shared={})
    return None
