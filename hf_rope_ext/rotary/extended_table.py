"""The replacement for a table of sines and cosines, in families without a rotary module.

Such a family precomputes a table for a fixed number of positions and indexes it. Here rows are
computed on demand, so there is no last position, and each row of a batch can have its own
frequencies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.rotary.extended import ExtendedRotary


class ExtendedTable(ExtendedRotary):
    """A table of ``[sin, cos]`` rows, supporting the three ways in which families index theirs."""

    def rows(self, position_ids: Tensor) -> Tensor:
        """Return the rows of these positions.

        Args:
            position_ids: ``(batch, seq)``.

        Returns:
            Sines then cosines, float32, ``(batch, seq, rotary_dim)``.
        """
        frequencies, scaling = self.plan(None, position_ids)
        angles = position_ids[..., None].float() * frequencies.to(position_ids.device)
        rows = torch.cat((angles.sin(), angles.cos()), dim=-1) * scaling
        stock = self._stock_table().to(position_ids.device)
        # where the plan changes nothing, keep the bits of the stock table
        trained = self.rotations[None].trained.to(position_ids.device)
        unchanged = (frequencies == trained).all(-1, keepdim=True) & torch.as_tensor(
            scaling == 1.0, device=position_ids.device
        )
        kept = unchanged & (position_ids[..., None] < len(stock))
        return torch.where(kept, stock[position_ids.clamp(max=len(stock) - 1)].float(), rows)

    def forward(  # type: ignore[override]
        self, shape: torch.Size, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> "_ByRow":
        """Return rows like RoFormer's positional embedding, but for each row of the batch.

        Args:
            shape: Shape of the input, ``(batch, seq)``.
            past_key_values_length: First position.
            position_ids: Positions ``(seq,)`` to use instead of consecutive ones.
        """
        if position_ids is None:
            start = past_key_values_length
            position_ids = torch.arange(start, start + shape[1], device=self.device)
        return _ByRow(self.rows(position_ids[None]))

    def __getitem__(self, position_ids: Tensor) -> Tensor:
        """Return rows like indexing CodeGen's table."""
        return self.rows(position_ids)

    def repeat(self, *sizes: int) -> "ExtendedTable":
        """Return itself: GPT-J repeats its table over the batch before gathering from it."""
        return self

    @property
    def shape(self) -> tuple[int]:
        """The width of a row."""
        return (self.rotations[None].geometry.rotary_dim,)

    @property
    def device(self) -> torch.device:
        """Device of the frequencies."""
        return self.inv_freq.device  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Support ``torch.gather(table, 1, positions)``, which is how GPT-J looks up rows."""
        if func is torch.gather and isinstance(args[0], cls):
            return args[0].rows(args[2][..., 0])
        raise NotImplementedError(f"{func} of a rotary table")

    def _stock_table(self) -> Tensor:
        original = self.__dict__["original"]
        return original.weight if isinstance(original, nn.Embedding) else original


class _ByRow:
    """Sines and cosines ``(batch, seq, rotary_dim)`` where ``(seq, rotary_dim)`` is expected.

    RoFormer puts two axes in front of them, for rows and heads.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, axes: Any) -> Tensor:
        """Return them as ``(batch, 1, seq, rotary_dim)``."""
        return self.rows[:, None]
