"""Reversible changes: every mechanism of a patch, each with its own way back.

A patch is a list of changes. Applying, reverting and rolling it back are one loop each, whatever
the changes are.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import nn


class Change(Protocol):
    """Something that is done to a model and can be undone."""

    def apply(self) -> None:
        """Make the change. Where this raises, `revert` undoes what was already made of it."""

    def revert(self) -> None:
        """Put back what was there before; does nothing where nothing is applied."""


def apply_all(changes: Sequence[Change]) -> None:
    """Apply changes in order; if one raises, none of them stays."""
    try:
        for change in changes:
            change.apply()
    except BaseException:
        revert_all(changes)
        raise


def revert_all(changes: Sequence[Change]) -> None:
    """Revert changes, the last one first.

    A change that cannot be reverted does not keep the others from it: the rest are reverted, and
    then the first error is raised.
    """
    errors = []
    for change in reversed(changes):
        try:
            change.revert()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


class _Absent:
    """Stands for an attribute that is not there; a class, so that copies of it are itself."""


@dataclass(eq=False)
class SetAttributes:
    """New values of attributes of one object: a config, or a module's own (not its class's).

    Args:
        owner: The object.
        values: Its new attributes. After a revert, what they had become meanwhile, so that
            applying the change once more brings back somebody's edits too.
    """

    owner: Any
    values: Mapping[str, Any]
    before: Mapping[str, Any] | None = field(default=None, init=False)

    def apply(self) -> None:
        """Set the values."""
        self.before = self._read()
        self._write(self.values)

    def revert(self) -> None:
        """Restore the attributes, whatever has become of them meanwhile."""
        if self.before is None:
            return
        current = self._read()
        self._write(self.before)
        self.values, self.before = current, None

    def _read(self) -> dict[str, Any]:
        # configs of transformers store some attributes under another name
        stored = getattr(self.owner, "attribute_map", {})
        held = vars(self.owner)
        return {name: held.get(stored.get(name, name), _Absent) for name in self.values}

    def _write(self, values: Mapping[str, Any]) -> None:
        current = self._read()
        for name, value in values.items():
            if value is not _Absent:
                setattr(self.owner, name, value)
            elif current[name] is not _Absent:
                delattr(self.owner, name)


@dataclass(eq=False)
class AddHooks:
    """Forward hooks of one module, called with keywords; the second also after an error.

    Args:
        module: The module.
        before: Called before its forward.
        after: Called after it.
    """

    module: nn.Module
    before: Callable[..., Any]
    after: Callable[..., Any]

    def apply(self) -> None:
        """Register the hooks."""
        self.module.register_forward_pre_hook(self.before, with_kwargs=True)
        self.module.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def revert(self) -> None:
        """Remove the hooks, and no others."""
        # by identity and not by handle, so that a copy of the model can be undone as well
        module = self.module
        for hooks, flags in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (
                module._forward_hooks,
                (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
            ),
        ):
            for key in [key for key, hook in hooks.items() if hook in (self.before, self.after)]:
                for table in (hooks, *flags):
                    table.pop(key, None)


class StandIn:
    """An attribute of one model that is called in place of a method of its class.

    Args:
        model: The model.
    """

    name: ClassVar[str]
    """The method it stands in for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def stock(self) -> Callable[..., Any]:
        """The class's own method, bound to the model."""
        # looked up at each call: a bound method would be pickled by its name, which is this
        # object's own
        method: Callable[..., Any] = getattr(type(self.model), self.name).__get__(self.model)
        return method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    def change(self) -> SetAttributes:
        """Return the change that puts it on its model."""
        return SetAttributes(self.model, {self.name: self})
