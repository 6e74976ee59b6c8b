"""The module that stands in for a family's rotary embedding.

It owns the frequencies and leaves everything else (halves or interleaved pairs, half width,
complex numbers, M-RoPE sections, the output's dtype) to the family's own ``forward``, which it
calls on a stand-in for the original module whose ``inv_freq`` and ``attention_scaling`` are the
plan's. The original is not touched, so undoing a patch means putting it back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.heads import PerHead
from hf_rope_ext.layouts import Turning
from hf_rope_ext.lengths import RUNNING, LengthPolicy, row_lengths
from hf_rope_ext.methods import Method

UNCHANGED = 1e-12
"""Relative difference of two float64 frequencies that are the same."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one set of frequencies is computed.

    Args:
        method: What extends them.
        geometry: What was trained.
        trained: The frequencies the stock model computes with, float32, on the CPU, in the order
            the family stores them.
        pair_order: That order, None for the natural one.
        scales_rotation: Whether the temperature goes into cos and sin.
        policy: How a length-dependent method follows requests.
        turning: A layout in place of the family's own, None for that.
    """

    method: Method
    geometry: RopeGeometry
    trained: Tensor
    pair_order: list[int] | None = None
    scales_rotation: bool = True
    policy: LengthPolicy = field(default_factory=LengthPolicy)
    turning: Turning | None = None

    def within(self) -> tuple[Tensor, float]:
        """Return the static plan, or a length-dependent one's up to the trained length.

        Returns:
            Frequencies, float32, ``(pairs,)`` (``(axes, pairs)`` where heads have axes), and what
            cos and sin are multiplied by. A pair that the method leaves alone keeps the bits of the
            stock buffer: float64 rounded to float32 can differ from it in the last one.
        """
        plan = self._planned(self.method.plan, self.geometry)
        same = torch.isclose(plan.inv_freq, self.geometry.inv_freq(), rtol=UNCHANGED, atol=0.0)
        frequencies = torch.where(
            self.ordered(same), self.trained, self.ordered(plan.inv_freq).float()
        )
        return frequencies, float(plan.attention_scaling) if self.scales_rotation else 1.0

    def at(self, lengths: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Scale]:
        """Return the plan of a request.

        Args:
            lengths: Length of each row, ``(batch, 1, 1)``, before it is rounded up.
            inv_freq: What `within` returned.
            scaling: What `within` returned.

        Returns:
            Frequencies, float32, ``(batch, 1, pairs)`` (with ``axes`` in front where heads have
            axes), and a number or ``(batch, 1, 1)``.
        """
        trained = self.geometry.original_max_position_embeddings
        lengths = self.policy.rounded(lengths, trained)
        geometry = replace(self.geometry, device=lengths.device)
        plan = self._planned(lambda own: self.method.plan_at(own, lengths), geometry)
        before = self._planned(self.method.plan, geometry).inv_freq
        within, beyond = inv_freq.to(lengths.device), lengths > trained
        if within.ndim == 2:
            within, before = within[:, None, None], before[:, None, None]
        # what does not follow the request, such as another axis, keeps its bits
        moved = beyond & ~torch.isclose(plan.inv_freq, before, rtol=UNCHANGED, atol=0.0)
        frequencies = torch.where(self.ordered(moved), self.ordered(plan.inv_freq).float(), within)
        if not isinstance(plan.attention_scaling, Tensor):
            return frequencies, scaling
        return frequencies, torch.where(beyond, plan.attention_scaling, scaling).float()

    def _planned(
        self, plan: Callable[[RopeGeometry], FrequencyPlan], geometry: RopeGeometry
    ) -> FrequencyPlan:
        """Return a plan as the layout has it.

        Pairs that rest have frequency 0. Where heads have axes it is planned for every axis, as if
        all pairs turned by it.
        """
        planned, turning = plan(geometry), self.turning
        if turning is None:
            return planned
        inv_freq = planned.inv_freq
        if turning.per_head:
            by_axis = [
                plan(replace(geometry, axes=(name,) * geometry.pairs)) for name in turning.names
            ]
            inv_freq = torch.stack([one.inv_freq for one in by_axis])
        elif turning.resting is not None:
            rests = [row == turning.resting for row in turning.rows]
            inv_freq = inv_freq.masked_fill(torch.tensor(rests, device=inv_freq.device), 0.0)
        return replace(planned, inv_freq=inv_freq)

    def used(self, inv_freq: Tensor) -> Tensor:
        """Return frequencies without those of axes that no head turns by."""
        if self.turning is None or not self.turning.per_head:
            return inv_freq
        return inv_freq[sorted(set(self.turning.rows))]

    def ordered(self, per_pair: Tensor) -> Tensor:
        """Return values per pair in the order the family stores them."""
        return per_pair if self.pair_order is None else per_pair[..., self.pair_order]


class ExtendedRotary(nn.Module):
    """A family's rotary embedding with other frequencies.

    Frequencies stay float32 whatever the model is cast to, and are made afresh wherever the model
    is moved, so a cast or an empty copy of the model cannot spoil them.

    Args:
        original: The rotary module whose layout is used.
        rotations: The sets of frequencies to compute with, by layer type (None where the family
            does not distinguish); other layer types go to ``original``.
        patch: What the patch changed beside this module, for undoing it.
        path: Where it hangs.
        reads_config: Whether ``original`` computes its frequencies from the config every time.
    """

    original: Any
    attention_scaling: float

    def __init__(
        self,
        original: nn.Module | Tensor,
        rotations: Mapping[str | None, Rotation],
        patch: object,
        *,
        path: str = "",
        reads_config: bool = False,
    ) -> None:
        super().__init__()
        self.rotations = dict(rotations)
        self.patch = patch
        self.path = path
        self.stock_length: Tensor | None = None
        self.reads_config = reads_config
        device = _device(original)
        persistent: dict[str, Any] = {}
        if isinstance(original, nn.Module):
            persistent = original.state_dict(keep_vars=True)
            for name, tensor in persistent.items():
                setattr(
                    self, name, tensor if isinstance(tensor, nn.Parameter) else nn.Buffer(tensor)
                )
        for label in self.rotations:
            frequencies, scaling = self.rotations[label].within()
            name = _key(label, "inv_freq")
            self.register_buffer(name, frequencies.to(device), persistent=name in persistent)
            setattr(self, _key(label, "attention_scaling"), scaling)
        # not registered as a submodule: nothing that walks the model should see it
        self.__dict__["original"] = original

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> Any:
        """Return what the family's rotary embedding returns, computed with the plan.

        Args:
            x: Gives the dtype and device of the result.
            position_ids: ``(batch, seq)``, or ``(axes, batch, seq)`` for M-RoPE.
            layer_type: Key of the layer type, in families that distinguish.
        """
        original = self.__dict__["original"]
        label = layer_type if layer_type in self.rotations else None
        arguments = (x, position_ids) if layer_type is None else (x, position_ids, layer_type)
        if label not in self.rotations:
            return original(*arguments)
        frequencies, scaling = self.plan(label, position_ids)
        turning = self.rotations[label].turning
        if turning is None:
            return self.laid_out(label, frequencies, scaling, *arguments)
        assert position_ids is not None  # families with several axes always give them
        # angles for frequencies, at position 1: the family's code is left with the rest
        order = self.rotations[label].pair_order
        angles = turning.angles(position_ids, frequencies.to(position_ids.device), order)
        still = torch.ones_like(position_ids)
        if not turning.per_head:
            return self.laid_out(label, angles, scaling, x, still, *arguments[2:])
        by_axis = [self.laid_out(label, one, scaling, x, still, *arguments[2:]) for one in angles]
        return PerHead.of(by_axis, turning.rows)

    def laid_out(
        self, label: str | None, frequencies: Tensor, scaling: Scale, *arguments: Any
    ) -> Any:
        """Return what the family's own code makes of frequencies and the arguments of `forward`."""
        original = self.__dict__["original"]
        stand_in = _StandIn(original, self, label, frequencies, scaling)
        return type(original).forward(stand_in, *arguments)

    def plan(self, label: str | None, position_ids: Tensor | None) -> tuple[Tensor, Scale]:
        """Return frequencies and scaling for these positions.

        Returns:
            ``(pairs,)`` and a number; for a length-dependent method ``(batch, 1, pairs)`` and a
            number or ``(batch, 1, 1)``.
        """
        rotation = self.rotations[label]
        if not rotation.method.length_dependent or position_ids is None:
            return self._within(label)
        if rotation.policy.compat is not None:
            return rotation.at(self._stock_length(rotation, position_ids), *self._within(label))
        call = RUNNING.call
        if call is None:
            return rotation.at(row_lengths(position_ids), *self._within(label))
        lengths = call.note(position_ids)
        known, key = call.plan.frequencies, f"{self.path} {label}"
        if key not in known:
            known[key] = rotation.at(lengths, *self._within(label))
        return known[key]

    def names(self) -> dict[str, str | None]:
        """Return the names of its sets of frequencies in a plan, with their layer types."""
        return {f"{self.path} {label}": label for label in self.rotations}

    def frequencies_at(self, key: str, lengths: Tensor) -> tuple[Tensor, Scale]:
        """Return frequencies and scaling by name for rows of these lengths, ``(batch, 1, 1)``."""
        label = self.names()[key]
        return self.rotations[label].at(lengths, *self._within(label))

    def _within(self, label: str | None) -> tuple[Tensor, float]:
        return getattr(self, _key(label, "inv_freq")), getattr(
            self, _key(label, "attention_scaling")
        )

    def _stock_length(self, rotation: Rotation, position_ids: Tensor) -> Tensor:
        """Return the one length that stock transformers would go by, ``(1, 1, 1)``.

        Its ``dynamic`` keeps the longest one seen until a call is shorter than the trained length;
        its ``longrope`` looks at the call alone.
        """
        length = row_lengths(position_ids).amax(dim=0, keepdim=True)
        if rotation.method.name == "longrope":
            return length
        trained = rotation.geometry.original_max_position_embeddings
        kept = length if self.stock_length is None else self.stock_length.to(length.device)
        kept = torch.where(length < trained, length, torch.maximum(length, kept))
        self.stock_length = kept
        return kept

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Make the frequencies NaN for the duration of a ``with`` block."""
        names = [_key(label, "inv_freq") for label in self.rotations]
        sound = {name: getattr(self, name) for name in names}
        try:
            for name in names:
                setattr(self, name, torch.full_like(sound[name], torch.nan))
            yield
        finally:
            for name in names:
                setattr(self, name, sound[name])

    def restored(self) -> nn.Module | Tensor:
        """Return the original, with what was loaded, moved or trained meanwhile."""
        original = self.__dict__["original"]
        if isinstance(original, nn.Module):
            for name in original.state_dict():
                if not name.endswith("inv_freq"):
                    setattr(original, name, getattr(self, name))
        return original  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Look the rest up in the original: some models read attributes of their rotary module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names are hooks and bookkeeping of the module itself
            if name.startswith("_") or "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExtendedRotary":
        before = {label: getattr(self, _key(label, "inv_freq")) for label in self.rotations}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for label, buffer in before.items():
            name = _key(label, "inv_freq")
            moved = getattr(self, name)
            if moved is not buffer:
                # whatever fn made of the values (a cast, garbage): only the device is its to say
                setattr(self, name, self.rotations[label].within()[0].to(moved.device))
        device = _device(self)
        original = self.__dict__["original"]
        if device.type == "meta":
            return self
        if isinstance(original, nn.Module):
            for name, tensor in original._buffers.items():
                original._buffers[name] = None if tensor is None else tensor.to(device)
        else:
            self.__dict__["original"] = original.to(device)
        return self

    def extra_repr(self) -> str:
        """Name the method and the module it stands in for."""
        methods = {repr(rotation.method) for rotation in self.rotations.values()}
        return f"{', '.join(methods)}, in place of {type(self.__dict__['original']).__name__}"


class _StandIn:
    """What a rotary module's forward takes for ``self``: the plan in front, the original behind."""

    def __init__(
        self,
        original: nn.Module,
        extended: ExtendedRotary,
        label: str | None,
        frequencies: Tensor,
        scaling: Scale,
    ) -> None:
        self.__dict__["original"] = original
        self.__dict__["extended"] = extended
        setattr(self, _key(label, "inv_freq"), frequencies)
        setattr(self, _key(label, "attention_scaling"), scaling)
        # of the types, only this one leaves what it is given alone
        self.rope_type = "default" if label is None else {label: "default"}
        if extended.reads_config:
            self.config = SimpleNamespace(rope_parameters={"rope_type": "default"})
            self.rope_init_fn = lambda config: (frequencies, scaling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["extended"], name)


def _key(label: str | None, name: str) -> str:
    """Return the attribute in which families keep ``name`` for a layer type."""
    return name if label is None else f"{label}_{name}"


def _device(holder: nn.Module | Tensor) -> torch.device:
    if isinstance(holder, Tensor):
        return holder.device
    tensors = [*holder.buffers(recurse=False), *holder.parameters(recurse=False)]
    return tensors[0].device
