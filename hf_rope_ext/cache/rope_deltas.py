"""Keep the position offsets of one request from leaking into the next.

A vision-language model stores on itself the difference between positions and tokens
(``rope_deltas``) and uses it in every later call that adds to a cache, whichever request filled
that cache. In a patched model this note belongs to the cache: each call sees the note of its own
cache, or none, as a freshly loaded model would. A value that was set by hand stays.
"""

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_rope_ext.cache.followers import NOTE
from hf_rope_ext.changes import AddHooks, Change, StandIn
from hf_rope_ext.models import host
from hf_rope_ext.rotary.installed import SwapRotary


class _Prepared(threading.local):
    """The note that ``generate`` in this thread has prepared for the next call."""

    model: nn.Module | None = None
    note: Mapping[str, Any] = {}


_PREPARED = _Prepared()


class PositionNotes:
    """The forward hooks of a model that keeps notes.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.cache_name = host.cache_argument(model.forward)
        self.left = _noted(model)  # what earlier calls have left on the model, and nobody set

    def restore(self, module: nn.Module, cache: Any) -> None:
        """Put the note of a cache in place of what another request has left."""
        note: Mapping[str, Any] = {}
        if cache is not None and int(cache.get_seq_length()):
            note = getattr(cache, NOTE, {})
        for name, value in _noted(module).items():
            if value is self.left.get(name):
                setattr(module, name, note.get(name))
        self.left = {**self.left, **note}

    def recall(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Restore the cache's note before a call that computes its own positions (pre-hook).

        Returns:
            Its arguments, with a cache under the name that the model knows.
        """
        kwargs = host.with_cache_named(kwargs, self.cache_name)
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if arguments.get("position_ids") is None:
            _PREPARED.model = None
            self.restore(module, host.given_cache(arguments))
        return args, kwargs

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Store the note of a call on its cache (forward hook)."""
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        prepared, _PREPARED.model = _PREPARED.model is module, None
        self.left = _noted(module)
        if arguments.get("position_ids") is None:
            note = _noted(module)
        elif prepared:
            note = _PREPARED.note
        else:
            return  # positions passed by the user, or by a running `generate`
        cache = host.output_cache(output)
        if cache is None:
            cache = host.given_cache(arguments)
        if cache is not None:
            setattr(cache, NOTE, note)


class PreparePositions(StandIn):
    """Stands in for transformers' preparation of positions in ``generate``.

    Args:
        model: The model that generates.
        inner: The model that keeps the note.
        notes: Its hooks.
    """

    name = host.PREPARE_POSITIONS

    def __init__(self, model: nn.Module, inner: nn.Module, notes: PositionNotes) -> None:
        super().__init__(model)
        self.inner = inner
        self.notes = notes

    def __call__(self, inputs: Any, model_kwargs: Mapping[str, Any]) -> Any:
        """Prepare the positions under the note of the cache that is passed in."""
        self.notes.restore(self.inner, host.given_cache(model_kwargs))
        result = self.stock(inputs, model_kwargs)
        self.notes.left = _noted(self.inner)
        _PREPARED.model, _PREPARED.note = self.inner, _noted(self.inner)
        return result


def note_changes(model: nn.Module, swaps: Sequence[SwapRotary]) -> list[Change]:
    """Return the changes that tie a model's notes to its caches.

    Args:
        model: The model.
        swaps: Its new rotary modules.
    """
    changes: list[Change] = []
    rotating = {parent for swap in swaps for parent in swap.parents}
    prepared = set()
    for inner in [part for part in model.modules() if hasattr(part, host.POSITION_NOTES[0])]:
        if rotating.isdisjoint(inner.modules()):
            continue
        notes = PositionNotes(inner)
        changes.append(AddHooks(inner, notes.recall, notes.keep))
        for outer in model.modules():
            if not hasattr(type(outer), PreparePositions.name) or outer in prepared:
                continue
            if PreparePositions.name not in vars(outer) and inner in set(outer.modules()):
                prepared.add(outer)
                changes.append(PreparePositions(outer, inner, notes).change())
    return changes


def _noted(module: nn.Module) -> Mapping[str, Any]:
    return {name: getattr(module, name) for name in host.POSITION_NOTES if hasattr(module, name)}
