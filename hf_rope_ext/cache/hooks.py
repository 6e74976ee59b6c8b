"""The forward hooks through which a text model's calls are planned."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_rope_ext.cache.planner import Planner


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
