"""RoPE in two and three dimensions: a position is a point, and each pair turns by one coordinate.

Free of any model: for vision and video towers of one's own, and as the plain form of what the
families do. A position ``(p_0, ..., p_{axes-1})`` turns pair ``i`` by ``p_axis(i) * inv_freq[i]``,
so the rotation is block-diagonal and attention scores depend on differences of positions alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Method, NoScaling, PerAxis

LAYOUTS = ("parts", "alternating", "blocks")
PAIRINGS = ("rotate_half", "interleaved")
SERIES = ("axis", "head", "dealt")


@dataclass(frozen=True)
class AxialRope:
    """A rotary embedding over two or three axes, with any method of `hf_rope_ext.methods` on each.

    Args:
        head_dim: Coordinates of a query or key head, even.
        axes: 2 (rows, columns) or 3 (time, rows, columns); the order is the caller's.
        base: The base of the frequencies.
        original_max_position_embeddings: Trained length in positions of every axis, or of each:
            the side of the grid in patches, the number of frames. Only `NoScaling` does without.
        layout: Which pairs an axis gets. ``"parts"``: a run of pairs each (Qwen2-VL's vision
            tower, the chunked M-RoPE). ``"alternating"``: a pair each in turn (Kimi K2.5, the
            interleaved M-RoPE); an axis that has all its pairs is passed over. ``"blocks"``: a run
            of the head's coordinates each, rotated as a head of its own (Gemma 4).
        pairing: ``"rotate_half"``: pair i is coordinates (i, i + rotary_dim / 2), of the block in
            layout ``"blocks"``. ``"interleaved"``: coordinates (2i, 2i + 1).
        series: The frequencies. ``"axis"``: each axis has a whole geometric series over its own
            pairs (the vision towers). ``"head"``: pair i has the head's i-th frequency, whatever
            its axis (M-RoPE). ``"dealt"``: the head's frequencies go to the axes in turn, also
            where its pairs do not alternate (Pixtral).
        sections: Pairs of each axis. When not given, all get the same number; a head that does not
            divide so is refused. What is left of the head, at its end, passes unrotated.
        method: What extends every axis, or one for each. A temperature concerns the logit, to which
            all axes add up: cos and sin of all pairs are multiplied by the largest.

    Raises:
        RopeError: If an argument is not one of these.
    """

    head_dim: int
    axes: int
    base: float = 10_000.0
    original_max_position_embeddings: int | Sequence[int] | None = None
    layout: str = "parts"
    pairing: str = "rotate_half"
    series: str = "axis"
    sections: Sequence[int] | None = None
    method: Method | Sequence[Method] = field(default_factory=NoScaling)

    def __post_init__(self) -> None:
        """Check everything, and hold sequences as tuples."""
        if not _is_int(self.axes) or self.axes not in (2, 3):
            raise RopeError(f"axes must be 2 or 3, got {self.axes!r}.")
        if not _is_int(self.head_dim) or self.head_dim < 2 or self.head_dim % 2:
            raise RopeError(
                f"head_dim must be an even number of coordinates, got {self.head_dim!r}."
            )
        if not isinstance(self.base, int | float) or not 1 < self.base < math.inf:
            raise RopeError(f"base must be a finite number above 1, got {self.base!r}.")
        for name, known in (("layout", LAYOUTS), ("pairing", PAIRINGS), ("series", SERIES)):
            if getattr(self, name) not in known:
                raise RopeError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got "
                    f"{getattr(self, name)!r}."
                )
        if not isinstance(self.method, Method):
            object.__setattr__(self, "method", self._one_per_axis("method", self.method))
        for method in self.methods:
            if not isinstance(method, Method) or isinstance(method, PerAxis):
                raise RopeError(
                    f"method must be a Method or a sequence of one per axis, got {method!r}; "
                    f"make_method makes one from a name."
                )
        self._check_sections()
        self._check_trained()

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method of each axis."""
        method = self.method
        return (method,) * self.axes if isinstance(method, Method) else tuple(method)

    @property
    def pairs(self) -> int:
        """Number of pairs that rotate."""
        return sum(self._sections)

    @property
    def rotary_dim(self) -> int:
        """Coordinates that rotate, the first of the head."""
        return 2 * self.pairs

    def pair_axes(self) -> tuple[int, ...]:
        """Return the axis of each pair."""
        if self.layout == "alternating":
            return self._dealt()
        return tuple(axis for axis, size in enumerate(self._sections) for _ in range(size))

    def geometry(self, axis: int) -> RopeGeometry:
        """Return what was trained along one axis, as its method sees it.

        With ``series="axis"`` the axis is a rotary embedding of its own; else it has the whole
        head's frequencies, of which it uses those of its pairs.
        """
        trained = self.original_max_position_embeddings
        length = trained[axis] if isinstance(trained, tuple) else trained
        width = 2 * self._sections[axis] if self.series == "axis" else self.rotary_dim
        return RopeGeometry(width, float(self.base), length or 1)  # type: ignore[arg-type]

    def inv_freq(self) -> Tensor:
        """Return the frequencies of the pairs in radians per position, float64, ``(pairs,)``.

        Of a length-dependent method they are those up to the trained length.
        """
        return self._plan(None)[0]

    def cos_sin(
        self, positions: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin of each coordinate's angle, times the temperature.

        They fit transformers' ``apply_rotary_pos_emb`` of the same pairing as well as `apply`, and
        serve all layers. An axis whose method depends on the length gets, in each row, the plan
        for that row's largest position on that axis; rotate queries and keys in one call then.

        Args:
            positions: ``(seq, axes)`` or ``(batch, seq, axes)``, integers or floats.
            dtype: Of angles and result.

        Returns:
            Two tensors of ``(seq, rotary_dim)`` or ``(batch, seq, rotary_dim)``.

        Raises:
            RopeError: If the positions have another shape.
        """
        self._check_positions(positions)
        frequencies, scaling = self._plan(positions)
        frequencies, scaling = (
            part.to(device=positions.device, dtype=dtype) for part in (frequencies, scaling)
        )
        axes = torch.tensor(self.pair_axes(), device=positions.device)
        angles = positions.to(dtype).index_select(-1, axes) * frequencies
        return self._spread(angles.cos() * scaling), self._spread(angles.sin() * scaling)

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return queries or keys rotated by what `cos_sin` returned.

        Args:
            x: ``(batch, heads, seq, head_dim)``.
            cos: ``(seq, rotary_dim)`` or ``(batch, seq, rotary_dim)``.
            sin: The same.

        Returns:
            The same shape and dtype as ``x``, computed in the wider of both dtypes.

        Raises:
            RopeError: If the shapes do not fit.
        """
        self._check_heads(x, cos, "cos and sin")
        if cos.shape != sin.shape or cos.shape[-1] != self.rotary_dim:
            raise RopeError(
                f"cos and sin must have {self.rotary_dim} values for each position, as cos_sin "
                f"returns them, got {tuple(cos.shape)} and {tuple(sin.shape)}."
            )
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        turning, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        turned = turning * cos + self._quarter_turn(turning) * sin
        return torch.cat((turned.to(x.dtype), rest), dim=-1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys rotated to their positions, in float32 at least.

        Args:
            x: ``(batch, heads, seq, head_dim)``.
            positions: ``(seq, axes)`` or ``(batch, seq, axes)``.

        Returns:
            The same shape and dtype as ``x``.

        Raises:
            RopeError: If the shapes do not fit.
        """
        self._check_positions(positions)
        self._check_heads(x, positions, "positions")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.apply(x, *self.cos_sin(positions, dtype))

    @property
    def _sections(self) -> tuple[int, ...]:
        return self.sections or (self.head_dim // 2 // self.axes,) * self.axes  # type: ignore[return-value]

    def _dealt(self) -> tuple[int, ...]:
        """Return the axes of pairs that are given to them in turn."""
        turns = [(turn, axis) for axis, size in enumerate(self._sections) for turn in range(size)]
        return tuple(axis for _, axis in sorted(turns))

    def _plan(self, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return frequencies per pair and temperature, float64.

        Returns:
            ``(pairs,)`` and ``(1,)``; for positions and a length-dependent method ``(1, pairs)``
            and ``(1, 1)``, with the batch in front where positions have one.
        """
        rows: tuple[int, ...] = ()
        device = torch.device("cpu")
        if positions is not None and any(method.length_dependent for method in self.methods):
            lengths = positions.double().amax(dim=-2, keepdim=True) + 1
            rows, device = tuple(lengths.shape[:-1]), positions.device
        frequencies = torch.empty(*rows, self.pairs, dtype=torch.float64, device=device)
        temperatures = torch.empty(*rows, self.axes, dtype=torch.float64, device=device)
        for axis, method in enumerate(self.methods):
            geometry = replace(self.geometry(axis), device=device)
            if rows and method.length_dependent:
                plan = method.plan_at(geometry, lengths[..., axis : axis + 1])
            else:
                plan = method.plan(geometry)
            own = _places(self.pair_axes(), axis)
            used = {
                "axis": list(range(len(own))),
                "head": own,
                "dealt": _places(self._dealt(), axis),
            }[self.series]
            frequencies[..., own] = plan.inv_freq[..., used]
            temperatures[..., axis : axis + 1] = plan.attention_scaling
        return frequencies, temperatures.amax(dim=-1, keepdim=True)

    def _spread(self, per_pair: Tensor) -> Tensor:
        """Return a value per pair at both of its coordinates."""
        if self.pairing == "interleaved":
            return per_pair.repeat_interleave(2, dim=-1)
        runs = torch.split(per_pair, self._runs(), dim=-1)
        return torch.cat([half for run in runs for half in (run, run)], dim=-1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """Return every pair turned by 90 degrees."""
        if self.pairing == "interleaved":
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        runs = torch.split(x, [2 * size for size in self._runs()], dim=-1)
        halves = [run.chunk(2, dim=-1) for run in runs]
        return torch.cat([half for first, second in halves for half in (-second, first)], dim=-1)

    def _runs(self) -> list[int]:
        """Return the numbers of pairs whose coordinates stand together."""
        return list(self._sections) if self.layout == "blocks" else [self.pairs]

    def _check_sections(self) -> None:
        pairs = self.head_dim // 2
        if self.sections is None:
            if pairs % self.axes:
                share = pairs // self.axes
                raise RopeError(
                    f"the {pairs} pairs of head_dim={self.head_dim} do not divide among "
                    f"{self.axes} axes; pass sections, such as {(share,) * self.axes} to leave "
                    f"{pairs - share * self.axes} unrotated."
                )
            return
        sections = self._one_per_axis("sections", self.sections)
        if not all(_is_int(size) and size > 0 for size in sections) or sum(sections) > pairs:
            raise RopeError(
                f"sections must be positive numbers of pairs, at most {pairs} together for "
                f"head_dim={self.head_dim}, got {sections!r}."
            )
        object.__setattr__(self, "sections", sections)

    def _check_trained(self) -> None:
        trained = self.original_max_position_embeddings
        if trained is None:
            scaled = [method for method in self.methods if not isinstance(method, NoScaling)]
            if scaled:
                raise RopeError(
                    f"{scaled[0]!r} needs original_max_position_embeddings: the trained length in "
                    f"positions, one for all axes or one for each."
                )
            return
        if not _is_int(trained):
            trained = self._one_per_axis("original_max_position_embeddings", trained)
            object.__setattr__(self, "original_max_position_embeddings", trained)
        lengths = trained if isinstance(trained, tuple) else (trained,)
        if not all(_is_int(length) and length > 0 for length in lengths):
            raise RopeError(
                f"original_max_position_embeddings must be a positive number of positions, or one "
                f"per axis, got {trained!r}."
            )

    def _one_per_axis(self, name: str, values: Any) -> tuple[Any, ...]:
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != self.axes:
            raise RopeError(f"{name} must have one value for each of {self.axes} axes: {values!r}.")
        return tuple(values)

    def _check_positions(self, positions: Tensor) -> None:
        if not isinstance(positions, Tensor):
            raise RopeError(f"positions must be a tensor, got {type(positions).__name__}.")
        if positions.dim() not in (2, 3) or positions.shape[-1] != self.axes:
            raise RopeError(
                f"positions must have shape (seq, {self.axes}) or (batch, seq, {self.axes}), got "
                f"{tuple(positions.shape)}."
            )
        if positions.is_complex() or positions.dtype == torch.bool:
            raise RopeError(f"positions must be integers or floats, got {positions.dtype}.")

    def _check_heads(self, x: Tensor, places: Tensor, name: str) -> None:
        """Check queries or keys, and that something per position fits them."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != self.head_dim:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RopeError(
                f"queries and keys must have shape (batch, heads, seq, {self.head_dim}), got "
                f"{found}."
            )
        batch, _, seq, _ = x.shape
        if places.shape[-2] != seq or (places.dim() == 3 and places.shape[0] not in (1, batch)):
            raise RopeError(
                f"{name} of shape {tuple(places.shape)} do not fit queries or keys of batch "
                f"{batch} and seq {seq}."
            )


def _places(owners: Sequence[int], axis: int) -> list[int]:
    return [place for place, owner in enumerate(owners) if owner == axis]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
