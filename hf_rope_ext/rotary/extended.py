"""The module that replaces a family's rotary embedding.

It owns the frequencies and leaves everything else (rotate-half or interleaved pairs, half width,
complex numbers, M-RoPE sections, output dtype) to the family's own ``forward``, called with a proxy
for ``self`` whose ``inv_freq`` and ``attention_scaling`` come from the plan. The original module is
never modified, so undoing a patch means putting it back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.geometry import Scale
from hf_rope_ext.models.host import mrope_section
from hf_rope_ext.rotary.per_head import PerHead
from hf_rope_ext.rotary.request_plan import row_lengths
from hf_rope_ext.rotary.rotation import Rotation
from hf_rope_ext.rotary.running import RUNNING, innermost


class ExtendedRotary(nn.Module):
    """A family's rotary embedding with new frequencies.

    Frequencies stay float32 whatever the model is cast to, and are recomputed whenever the model
    is moved, so neither a cast nor an empty copy of the model can corrupt them.

    Args:
        original: The rotary module (or table) it replaces, whose layout it uses.
        rotations: The frequencies by layer type (None where the family has one set); layer types
            that are not listed go to ``original``.
        patch: The patch it belongs to.
        path: Dotted path from the patched model.
        reads_config: Whether ``original`` recomputes its frequencies from the config in every call.
    """

    original: Any
    attention_scaling: float
    axes: int
    """Number of position axes of M-RoPE; 0 for other models."""
    planner: object = None
    """Who plans the requests of its text model, for length-dependent methods."""

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
        self.follow(original)
        # not a submodule: nothing that walks the model should see the original
        self.__dict__["original"] = original
        self.axes = len(mrope_section(original))
        self.takes_rows = isinstance(original, Tensor | nn.Embedding) or all(
            self._takes_rows(label, rotation)
            for label, rotation in self.rotations.items()
            if rotation.method.length_dependent or rotation.layout is not None
        )

    def follow(self, original: nn.Module | Tensor) -> None:
        """Adopt the device, the training mode and the learned tensors of the original."""
        device = _device(original)
        persistent: dict[str, Any] = {}
        if isinstance(original, nn.Module):
            self.training = original.training
            persistent = original.state_dict(keep_vars=True)
            for name, tensor in persistent.items():
                setattr(
                    self, name, tensor if isinstance(tensor, nn.Parameter) else nn.Buffer(tensor)
                )
        for label, rotation in self.rotations.items():
            frequencies, scaling = rotation.trained_plan()
            name = _key(label, "inv_freq")
            self.register_buffer(name, frequencies.to(device), persistent=name in persistent)
            setattr(self, _key(label, "attention_scaling"), scaling)

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> Any:
        """Return the family's cosines and sines, computed with the plan.

        Args:
            x: Determines dtype and device of the result.
            position_ids: ``(batch, seq)``, or ``(axes, batch, seq)`` for M-RoPE.
            layer_type: The layer type, in families with one set of frequencies for each.
        """
        original = self.__dict__["original"]
        label = layer_type if layer_type in self.rotations else None
        arguments = (x, position_ids) if layer_type is None else (x, position_ids, layer_type)
        if label not in self.rotations:
            return original(*arguments)
        frequencies, scaling = self.plan(label, position_ids)
        layout = self.rotations[label].layout
        if layout is None:
            return self.run_family_forward(label, frequencies, scaling, *arguments)
        assert position_ids is not None  # families with several axes always pass them
        # a layout of our own: its angles go in as frequencies at position 1, so that the family's
        # code still does everything else
        order = self.rotations[label].pair_order
        angles = layout.angles(position_ids, frequencies.to(position_ids.device), order)
        still = torch.ones_like(position_ids)
        if not layout.per_head:
            return self.run_family_forward(label, angles, scaling, x, still, *arguments[2:])
        by_axis = [
            self.run_family_forward(label, one, scaling, x, still, *arguments[2:]) for one in angles
        ]
        return PerHead.of(by_axis, layout.rows)

    def run_family_forward(
        self,
        label: str | None,
        frequencies: Tensor,
        scaling: Scale,
        x: Tensor,
        position_ids: Tensor | None,
        *layer_type: str,
    ) -> Any:
        """Run the family's own ``forward`` with these frequencies."""
        if position_ids is not None:
            position_ids = self.shape_positions(position_ids)
            rows = frequencies.shape[0] if frequencies.ndim > 2 else 1
            if rows > 1 and position_ids.shape[-2] == 1:  # all rows have the same positions
                position_ids = position_ids.expand(*position_ids.shape[:-2], rows, -1)
            if frequencies.ndim > 2 and not self.takes_rows:
                return self._run_by_row(label, frequencies, scaling, x, position_ids, *layer_type)
        original = self.__dict__["original"]
        stand_in = _StandIn(original, self, label, frequencies, scaling)
        return type(original).forward(stand_in, x, position_ids, *layer_type)

    def _run_by_row(
        self,
        label: str | None,
        frequencies: Tensor,
        scaling: Scale,
        x: Tensor,
        position_ids: Tensor,
        *layer_type: str,
    ) -> Any:
        """Run the family's own ``forward`` on each row, as a batch of one.

        Before transformers 5.19 families expand one vector of frequencies over the batch.
        """
        shape = position_ids.shape[-2:]
        rows = (shape[0], frequencies.shape[1])
        if rows[1] > 1:  # frequencies differ by token
            position_ids = position_ids.flatten(-2)[..., None]
        frequencies = frequencies.expand(*rows, -1).flatten(0, 1)
        factors = scaling.expand(*rows, 1).flatten(0, 1) if isinstance(scaling, Tensor) else scaling

        def run(row: Tensor, factor: Scale, places: Tensor) -> Any:
            return self.run_family_forward(label, row, factor, x, places, *layer_type)

        def join(part: Tensor) -> Tensor:
            return part.movedim(0, -4).reshape(*part.shape[1:-3], *shape, -1)

        by_row = torch.vmap(run, in_dims=(0, 0 if isinstance(factors, Tensor) else None, -3))
        found = by_row(frequencies, factors, position_ids[..., None, :])
        return join(found) if isinstance(found, Tensor) else tuple(map(join, found))

    def shape_positions(self, position_ids: Tensor) -> Tensor:
        """Return positions as every release of the family takes them, with all axes for M-RoPE.

        Args:
            position_ids: ``(batch, seq)`` or ``(1, batch, seq)`` for text, or with all axes.
        """
        is_text = position_ids.ndim == 2 or position_ids.shape[0] == 1
        return position_ids.expand(self.axes, -1, -1) if self.axes and is_text else position_ids

    def _takes_rows(self, label: str | None, rotation: Rotation) -> bool:
        """Return whether the family's code broadcasts frequencies that differ by row, by trying."""
        self.takes_rows = True
        device = _device(self.original)
        places = torch.zeros(2, 1, device=device)
        rows = rotation.trained.to(device).expand(2, 1, -1)
        layer_type = () if label is None else (label,)
        try:
            with torch.no_grad():
                self.run_family_forward(label, rows, 1.0, places[..., None], places, *layer_type)
        except Exception:  # it expands one vector over the batch, or the probe says what is wrong
            return False
        return True

    def plan(self, label: str | None, position_ids: Tensor | None) -> tuple[Tensor, Scale]:
        """Return frequencies and scaling for these positions.

        Returns:
            ``(pairs,)`` and a number; for a length-dependent method ``(batch, 1, pairs)`` and a
            number or ``(batch, 1, 1)``.
        """
        rotation = self.rotations[label]
        follows = rotation.method.length_dependent
        if position_ids is None or not (follows or self.planner):
            return self._trained_plan(label)
        if rotation.policy.compat is not None:
            return rotation.plan_for(
                self._stock_length(rotation, position_ids), *self._trained_plan(label)
            )
        call = innermost(RUNNING.call, self.planner)
        if call is None:
            if not follows:
                return self._trained_plan(label)
            return rotation.plan_for(row_lengths(position_ids), *self._trained_plan(label))
        lengths = call.record_positions(position_ids)
        known, key = call.plan.frequencies, f"{self.path} {label}"
        if not follows and key not in known:
            return self._trained_plan(label)
        if key not in known:
            known[key] = rotation.plan_for(lengths, *self._trained_plan(label))
        return known[key]

    def names(self) -> dict[str, str | None]:
        """Return the keys of its frequencies in a `CachePlan`, with their layer types."""
        return {f"{self.path} {label}": label for label in self.rotations}

    def frequencies_at(self, key: str, lengths: Tensor) -> tuple[Tensor, Scale]:
        """Return the frequencies and scaling of one key for row lengths ``(batch, 1, 1)``."""
        label = self.names()[key]
        return self.rotations[label].plan_for(lengths, *self._trained_plan(label))

    def _trained_plan(self, label: str | None) -> tuple[Tensor, float]:
        return getattr(self, _key(label, "inv_freq")), getattr(
            self, _key(label, "attention_scaling")
        )

    def _stock_length(self, rotation: Rotation, position_ids: Tensor) -> Tensor:
        """Return the single length that stock transformers would use, ``(1, 1, 1)``.

        Its ``dynamic`` remembers the longest call until one is shorter than the trained length; its
        ``longrope`` uses the current call alone.
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
    def poison_frequencies(self) -> Iterator[None]:
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

    def take_original(self) -> nn.Module | Tensor:
        """Return the original, with tensors that were loaded, moved or trained meanwhile."""
        original = self.__dict__["original"]
        if isinstance(original, nn.Module):
            original.training = self.training
            for name in original.state_dict():
                if not name.endswith("inv_freq"):
                    setattr(original, name, getattr(self, name))
        return original  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Look up other attributes in the original: some models read them there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names are the module's own hooks and bookkeeping
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
                # of what fn made, only the device counts: it may have cast or emptied the values
                setattr(self, name, self.rotations[label].trained_plan()[0].to(moved.device))
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
    """The ``self`` of the family's forward: the plan's values first, then the original's."""

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
        # the only type whose forward does not update the frequencies it is given
        self.rope_type = "default" if label is None else {label: "default"}
        if extended.reads_config:
            self.config = SimpleNamespace(rope_parameters={"rope_type": "default"})
            self.rope_init_fn = lambda config: (frequencies, scaling)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["extended"], name)


def _key(label: str | None, name: str) -> str:
    """Return the attribute name that families use for a layer type."""
    return name if label is None else f"{label}_{name}"


def _device(holder: nn.Module | Tensor) -> torch.device:
    if isinstance(holder, Tensor):
        return holder.device
    tensors = [*holder.buffers(recurse=False), *holder.parameters(recurse=False)]
    return tensors[0].device
