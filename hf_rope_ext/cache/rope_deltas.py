"""Keep the positions of one request from those of the next.

A vision-language model notes on itself by how much positions and tokens differ (``rope_deltas``),
and goes by the note in every later call that adds to a cache, whatever request filled that cache.
In a patched model the note belongs to the cache: a call sees what was noted with its own, and none
where there is none, as a freshly loaded model would.
"""

import inspect
import threading
from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_rope_ext.cache.hooks import remove_hooks
from hf_rope_ext.rotary.extended import ExtendedRotary

DELTAS = "rope_deltas"
NOTES = (DELTAS, "_cached_decode_position_ids", "_prefill_len")
"""What models note; all of it is None in a model that has seen no request."""
PREPARES = "_prepare_position_ids_for_generation"


class _Prepared(threading.local):
    """What ``generate`` noted in this thread for the call that comes next."""

    model: nn.Module | None = None
    note: Mapping[str, Any] = {}


_PREPARED = _Prepared()


class Recall:
    """Forward pre-hook of a model that keeps notes."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = tuple(inspect.signature(model.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Bring back what was noted with the cache of a call that has to find its positions."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if given.get("position_ids") is None:
            _PREPARED.model = None
            _recall(module, given.get("past_key_values"))


class Note:
    """Forward hook of a model that keeps notes; it also runs when the forward raised."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = tuple(inspect.signature(model.forward).parameters)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Put what was noted with the cache."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        prepared, _PREPARED.model = _PREPARED.model is module, None
        if given.get("position_ids") is None:
            note = _noted(module)
        elif prepared:
            note = _PREPARED.note
        else:
            return  # positions given by hand, or by a running `generate`
        cache = getattr(output, "past_key_values", given.get("past_key_values"))
        if cache is not None:
            cache.hf_rope_ext_note = note


HOOKS = (Recall, Note)


class PreparePositions:
    """What stands in for transformers' preparation of the positions of ``generate``.

    Args:
        outer: The model that generates.
        inner: The model that keeps the note.
    """

    def __init__(self, outer: nn.Module, inner: nn.Module) -> None:
        self.outer = outer
        self.inner = inner

    def __call__(self, inputs: Any, model_kwargs: Mapping[str, Any]) -> Any:
        """Do what the class does, with the note of the cache that is passed in."""
        _recall(self.inner, model_kwargs.get("past_key_values"))
        result = getattr(type(self.outer), PREPARES)(self.outer, inputs, model_kwargs)
        _PREPARED.model, _PREPARED.note = self.inner, _noted(self.inner)
        return result


def install(model: nn.Module, rotaries: Mapping[str, ExtendedRotary]) -> None:
    """Bind the notes of a patched model to their caches."""
    extended = list(rotaries.values())
    for inner in [part for part in model.modules() if hasattr(part, DELTAS)]:
        if not any(part in extended for part in inner.modules()):
            continue
        inner.register_forward_pre_hook(Recall(inner), with_kwargs=True)
        inner.register_forward_hook(Note(inner), with_kwargs=True, always_call=True)
        for outer in model.modules():
            if hasattr(type(outer), PREPARES) and inner in list(outer.modules()):
                outer.__dict__.setdefault(PREPARES, PreparePositions(outer, inner))


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    remove_hooks(model, HOOKS)
    for part in model.modules():
        if isinstance(part.__dict__.get(PREPARES), PreparePositions):
            del part.__dict__[PREPARES]


def _recall(module: nn.Module, cache: Any) -> None:
    note: Mapping[str, Any] = {}
    if cache is not None and int(cache.get_seq_length()):
        note = getattr(cache, "hf_rope_ext_note", {})
    for name in NOTES:
        if hasattr(module, name):
            setattr(module, name, note.get(name))


def _noted(module: nn.Module) -> Mapping[str, Any]:
    return {name: getattr(module, name) for name in NOTES if hasattr(module, name)}
