"""RoPE in two and three dimensions: one coordinate of the position rotates each pair.

Independent of any model: for vision and video towers of your own, and as a reference for those
of model families. A position ``(p_0, ..., p_{axes-1})`` rotates pair ``i`` by ``p_axis(i) *
inv_freq[i]``; the rotation is block-diagonal, so attention scores depend only on differences of
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.checks import require_choice, require_integer, require_number
from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Method, NoScaling, PerAxis

LAYOUTS = ("parts", "alternating", "blocks")
PAIRINGS = ("rotate_half", "interleaved")
SERIES = ("axis", "head", "dealt")


@dataclass(frozen=True)
class AxialRope:
    """A rotary embedding over two or three axes, extended by any method of `hf_rope_ext.methods`.

    Args:
        head_dim: Dimensions of a query or key head, even.
        axes: 2 (rows, columns) or 3 (time, rows, columns); their order is up to the caller.
        base: The base of the frequencies.
        original_max_position_embeddings: Trained length in positions, for all axes or for each:
            patches along a side, number of frames. Only `NoScaling` can do without it.
        layout: Which pairs belong to an axis. ``"parts"``: consecutive pairs (Qwen2-VL's vision
            tower, chunked M-RoPE). ``"alternating"``: every second or third pair (Kimi K2.5,
            interleaved M-RoPE), skipping axes that have all their pairs. ``"blocks"``: consecutive
            dimensions of the head, rotated like a head of their own (Gemma 4).
        pairing: ``"rotate_half"`` pairs dimensions (i, i + rotary_dim / 2), for ``"blocks"`` within
            the block; ``"interleaved"`` pairs (2i, 2i + 1).
        series: Frequencies of the pairs. ``"axis"``: each axis has a complete geometric series over
            its own pairs (vision towers). ``"head"``: pair i has the i-th frequency of the head,
            whatever its axis (M-RoPE). ``"dealt"``: the frequencies of the head are assigned to the
            axes in turn, even if their pairs do not alternate (Pixtral).
        sections: Number of pairs per axis. By default equal, and it is an error if the pairs cannot
            be divided evenly. Dimensions left over at the end of the head are not rotated.
        method: The method of all axes, or of each. A temperature acts on the logit, to which all
            axes contribute: the largest one multiplies all cos and sin.

    Raises:
        RopeError: If an argument is invalid.
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
        """Check the arguments, and store sequences as tuples."""
        require_choice("axes", self.axes, (2, 3))
        require_integer("head_dim", self.head_dim, 2, unit="dimensions")
        if self.head_dim % 2:
            raise RopeError(f"head_dim must be even, got {self.head_dim!r}.")
        require_number("base", self.base, above=1.0)
        require_choice("layout", self.layout, LAYOUTS)
        require_choice("pairing", self.pairing, PAIRINGS)
        require_choice("series", self.series, SERIES)
        if not isinstance(self.method, Method):
            object.__setattr__(self, "method", self._one_per_axis("method", self.method))
        for method in self.methods:
            if not isinstance(method, Method) or isinstance(method, PerAxis):
                raise RopeError(
                    f"method must be a Method or a sequence of one per axis, got {method!r}; use "
                    f"make_method to make one from its name."
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
        """Number of rotated pairs."""
        return sum(self._sections)

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions, the first of the head."""
        return 2 * self.pairs

    def pair_axes(self) -> tuple[int, ...]:
        """Return the axis of each pair."""
        if self.layout == "alternating":
            return self._dealt()
        return tuple(axis for axis, size in enumerate(self._sections) for _ in range(size))

    def geometry(self, axis: int) -> RopeGeometry:
        """Return the trained geometry of one axis, as its method sees it.

        With ``series="axis"`` the axis is a rotary embedding of its own; otherwise it has the
        frequencies of the whole head, and uses those of its pairs.
        """
        trained = self.original_max_position_embeddings
        length = trained[axis] if isinstance(trained, tuple) else trained
        width = 2 * self._sections[axis] if self.series == "axis" else self.rotary_dim
        return RopeGeometry(width, float(self.base), length or 1)  # type: ignore[arg-type]

    def inv_freq(self) -> Tensor:
        """Return the frequencies of the pairs in radians per position, float64, ``(pairs,)``.

        For a length-dependent method, they are those up to the trained length.
        """
        return self._plan(None)[0]

    def cos_sin(
        self, positions: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Compute cos and sin of the angle of each dimension, multiplied by the temperature.

        They are valid for all layers, and for transformers' ``apply_rotary_pos_emb`` with the same
        pairing as well as for `apply`. With a length-dependent method, each row is planned for its
        largest position on each axis; use one call for queries and keys then.

        Args:
            positions: ``(seq, axes)`` or ``(batch, seq, axes)``, integers or floats.
            dtype: Of the angles and the result.

        Returns:
            Two tensors of shape ``(seq, rotary_dim)`` or ``(batch, seq, rotary_dim)``.

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
        """Rotate queries or keys by the result of `cos_sin`.

        Args:
            x: ``(batch, heads, seq, head_dim)``.
            cos: ``(seq, rotary_dim)`` or ``(batch, seq, rotary_dim)``.
            sin: The same.

        Returns:
            A tensor with the shape and dtype of ``x``, computed in the wider of the two dtypes.

        Raises:
            RopeError: If the shapes do not match.
        """
        self._check_heads(x, cos, "cos and sin")
        if cos.shape != sin.shape or cos.shape[-1] != self.rotary_dim:
            raise RopeError(
                f"cos and sin must have {self.rotary_dim} values for each position, as cos_sin "
                f"returns them, got {tuple(cos.shape)} and {tuple(sin.shape)}."
            )
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        rotary, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        rotated = rotary * cos + self._quarter_turn(rotary) * sin
        return torch.cat((rotated.to(x.dtype), rest), dim=-1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys to their positions, in float32 or wider.

        Args:
            x: ``(batch, heads, seq, head_dim)``.
            positions: ``(seq, axes)`` or ``(batch, seq, axes)``.

        Returns:
            A tensor with the shape and dtype of ``x``.

        Raises:
            RopeError: If the shapes do not match.
        """
        self._check_positions(positions)
        self._check_heads(x, positions, "positions")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.apply(x, *self.cos_sin(positions, dtype))

    @property
    def _sections(self) -> tuple[int, ...]:
        return self.sections or (self.head_dim // 2 // self.axes,) * self.axes  # type: ignore[return-value]

    def _dealt(self) -> tuple[int, ...]:
        """Return the axes of pairs that are assigned in turn."""
        turns = [(turn, axis) for axis, size in enumerate(self._sections) for turn in range(size)]
        return tuple(axis for _, axis in sorted(turns))

    def _plan(self, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the frequency of each pair and the temperature, float64.

        Returns:
            ``(pairs,)`` and ``(1,)``; with positions and a length-dependent method, ``(1, pairs)``
            and ``(1, 1)``, after the batch dimension of the positions if there is one.
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
            pairs = _indices(self.pair_axes(), axis)
            used = {
                "axis": list(range(len(pairs))),
                "head": pairs,
                "dealt": _indices(self._dealt(), axis),
            }[self.series]
            frequencies[..., pairs] = plan.inv_freq[..., used]
            temperatures[..., axis : axis + 1] = plan.attention_scaling
        return frequencies, temperatures.amax(dim=-1, keepdim=True)

    def _spread(self, per_pair: Tensor) -> Tensor:
        """Repeat a value per pair for both of its dimensions."""
        if self.pairing == "interleaved":
            return per_pair.repeat_interleave(2, dim=-1)
        runs = torch.split(per_pair, self._runs(), dim=-1)
        return torch.cat([half for run in runs for half in (run, run)], dim=-1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """Rotate every pair by 90 degrees."""
        if self.pairing == "interleaved":
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        runs = torch.split(x, [2 * size for size in self._runs()], dim=-1)
        halves = [run.chunk(2, dim=-1) for run in runs]
        return torch.cat([half for first, second in halves for half in (-second, first)], dim=-1)

    def _runs(self) -> list[int]:
        """Return the sizes of the groups of pairs whose dimensions are adjacent."""
        return list(self._sections) if self.layout == "blocks" else [self.pairs]

    def _check_sections(self) -> None:
        pairs = self.head_dim // 2
        if self.sections is None:
            if pairs % self.axes:
                share = pairs // self.axes
                raise RopeError(
                    f"the {pairs} pairs of head_dim={self.head_dim} cannot be divided evenly among "
                    f"{self.axes} axes; pass sections, such as {(share,) * self.axes}, which "
                    f"leaves {pairs - share * self.axes} unrotated."
                )
            return
        sections = self._one_per_axis("sections", self.sections)
        for size in sections:
            require_integer("each of sections", size, 1, unit="pairs")
        if sum(sections) > pairs:
            raise RopeError(
                f"sections must sum to at most the {pairs} pairs of head_dim={self.head_dim}, got "
                f"{sections!r}."
            )
        object.__setattr__(self, "sections", sections)

    def _check_trained(self) -> None:
        trained = self.original_max_position_embeddings
        if trained is None:
            scaled = [method for method in self.methods if not isinstance(method, NoScaling)]
            if scaled:
                raise RopeError(
                    f"{scaled[0]!r} needs original_max_position_embeddings: the trained length in "
                    f"positions, for all axes or for each."
                )
            return
        name, lengths = "original_max_position_embeddings", (trained,)
        if isinstance(trained, Sequence):
            lengths = self._one_per_axis(name, trained)
            object.__setattr__(self, name, lengths)
        for length in lengths:
            require_integer(name, length, 1, unit="positions")

    def _one_per_axis(self, name: str, values: Any) -> tuple[Any, ...]:
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != self.axes:
            raise RopeError(
                f"{name} must have one value for each of {self.axes} axes, got {values!r}."
            )
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

    def _check_heads(self, x: Tensor, values: Tensor, name: str) -> None:
        """Check queries or keys, and that values per position match them."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[-1] != self.head_dim:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RopeError(
                f"queries and keys must have shape (batch, heads, seq, {self.head_dim}), got "
                f"{shape}."
            )
        batch, _, seq, _ = x.shape
        if values.shape[-2] != seq or (values.dim() == 3 and values.shape[0] not in (1, batch)):
            raise RopeError(
                f"{name} of shape {tuple(values.shape)} do not match queries or keys of batch "
                f"{batch} and seq {seq}."
            )


def _indices(axes: Sequence[int], axis: int) -> list[int]:
    return [index for index, other in enumerate(axes) if other == axis]
