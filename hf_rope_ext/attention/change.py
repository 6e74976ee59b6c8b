"""The change that makes a model attend in the bands of a method, and the proof that it does."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.attention.banded import (
    BOUND,
    NAME,
    banded_attention,
    banded_mask,
    observing,
    poisoned,
)
from hf_rope_ext.attention.view import Bound
from hf_rope_ext.changes import Change, SetAttributes, apply_all, revert_all
from hf_rope_ext.errors import ProbeError, RopeError, UnsupportedModelError
from hf_rope_ext.methods.attention_method import attention_rules
from hf_rope_ext.models import host
from hf_rope_ext.models.smallest_call import arguments_for
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.pairs import PairReader, PairRotation
from hf_rope_ext.rotary.running import Generation, announce


class BandedAttention:
    """The change of one text model's attention; its rotary embeddings are already replaced.

    Applying it measures how queries and keys rotate, and so which modules it concerns.

    Args:
        model: The text model.
        rotaries: Its rotary embeddings.
        beside: What else is changed at each attention module that it concerns.
    """

    def __init__(
        self,
        model: nn.Module,
        rotaries: Sequence[ExtendedRotary],
        beside: Callable[[nn.Module], Change],
    ) -> None:
        self.model: Any = model
        self.rotaries = rotaries
        self.beside = beside
        self.method = next(iter(rotaries[0].rotations.values())).method
        self.names = [SetAttributes(self.model.config, {host.ATTENTION: NAME})]
        self.bounds: list[Change] = []

    def apply(self) -> None:
        """Replace the attention.

        Raises:
            UnsupportedModelError: If the family does not compute its attention by a registered
                function, or not of queries and keys that rotate in pairs.
        """
        if not host.takes_attention(self.model):
            raise self._unsupported("does not use transformers' attention interface")
        host.register_attention(NAME, banded_attention, banded_mask)
        apply_all(self.names)
        self.bounds = self._measure()
        apply_all(self.bounds)

    def revert(self) -> None:
        """Put the model's own attention back."""
        revert_all([*self.names, *self.bounds])
        self.bounds = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the attention known in the process that a patched model is unpickled in."""
        self.__dict__.update(state)
        host.register_attention(NAME, banded_attention, banded_mask)

    def prove(self) -> None:
        """Check that the scores of the bands reach the model's output.

        Raises:
            ProbeError: If they do not.
        """
        # outside any request, and not compiled: nothing else would see the NaN
        nothing = announce(Generation(reports=False))
        eagerly = torch.compiler.set_stance("force_eager")
        untouched = torch.random.fork_rng(devices=[])
        with nothing, eagerly, untouched, torch.no_grad(), poisoned():
            output = self.model(**arguments_for(self.model, self._device())[0])
        if not bool(output[0].isnan().any()):
            raise ProbeError(
                f"{type(self.model).__name__} does not use the attention that it is told to, so "
                f"{self.method.name} has no effect. Nothing was changed."
            )

    def require_in_force(self) -> None:
        """Check that nobody has replaced the attention since.

        Raises:
            RopeError: If somebody has.
        """
        for change in self.names:
            name = host.attention_name(change.owner)
            if name != NAME:
                raise RopeError(
                    f"the attention was set to {name!r} after the model was patched with "
                    f"{self.method.name}, which then has no effect; unpatch the model before "
                    f"set_attn_implementation."
                )

    def _measure(self) -> list[Change]:
        """Return what the attention modules are bound to; equal ones share it."""
        rules = attention_rules(self.method)
        assert rules is not None
        try:
            found = PairReader(self.model, self.rotaries, self._observe).rotations()
        except Exception as error:
            raise self._unsupported(
                f"could not be run on single tokens to measure how its queries and keys rotate "
                f"({type(error).__name__}: {error})"
            ) from error
        rotated: dict[nn.Module, dict[str, PairRotation]] = {}
        for name, rotation in found.items():
            observed: Any = name
            rotated.setdefault(observed[0], {})[observed[1]] = rotation
        bounds: list[Bound] = []
        changes: list[Change] = []
        for module, parts in rotated.items():
            if len(parts) < 2:
                raise self._unsupported("rotates its queries or its keys alone")
            if not getattr(module, "is_causal", True):
                raise self._unsupported("sees later tokens too, and distances are back from one")
            own = Bound(rules, self._rotary(parts["key"].key), parts["query"], parts["key"])
            bound = next((one for one in bounds if _same(one, own)), own)
            if bound is own:
                bounds.append(own)
            changes += [SetAttributes(module, {BOUND: bound}), self.beside(module)]
        if not changes:
            raise self._unsupported("rotates in no layer without a sliding window")
        return changes

    def _observe(self, arguments: dict[str, object]) -> dict[Hashable, Tensor]:
        with observing() as notes:
            self.model.forward(**arguments, **host.without_cache(self.model))
        return notes

    def _rotary(self, key: str) -> ExtendedRotary:
        return next(rotary for rotary in self.rotaries if key in rotary.names())

    def _device(self) -> torch.device:
        return next(self.rotaries[0].buffers()).device

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.method.name}: {type(self.model).__name__} {reason}. Nothing was changed; "
            f"methods that change frequencies alone, such as 'yarn', serve it."
        )


def _same(one: Bound, other: Bound) -> bool:
    """Return whether two modules rotate alike."""
    if one.rotary is not other.rotary:
        return False
    for mine, theirs in ((one.query, other.query), (one.key, other.key)):
        if mine.key != theirs.key or mine.is_scaled != theirs.is_scaled:
            return False
        for name in ("turns", "partner", "pair", "axis", "gain"):
            left, right = getattr(mine, name), getattr(theirs, name)
            if left.shape != right.shape:
                return False
            if not torch.allclose(left.float(), right.float(), atol=1e-4):
                return False
    return True
