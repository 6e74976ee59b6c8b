"""What stands in for a table of sines and cosines, in families without a rotary module.

Such a family makes a table of a fixed number of positions once and looks its rows up. Here a row
is computed when it is asked for, so there is no last position, and each row of the batch can have
its own frequencies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.rotary.extended import ExtendedRotary


class ExtendedTable(ExtendedRotary):
    """A table of ``[sin, cos]`` rows, answering the three ways the families look rows up."""

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
        # where nothing is changed the stock table's own bits are kept
        trained = self.rotations[None].trained.to(position_ids.device)
        unchanged = (frequencies == trained).all(-1, keepdim=True) & torch.as_tensor(
            scaling == 1.0, device=position_ids.device
        )
        kept = unchanged & (position_ids[..., None] < len(stock))
        return torch.where(kept, stock[position_ids.clamp(max=len(stock) - 1)].float(), rows)

    def forward(  # type: ignore[override]
        self, shape: torch.Size, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return rows as RoFormer's positional embedding does, ``(seq, rotary_dim)``.

        Args:
            shape: Shape of the input, ``(batch, seq)``.
            past_key_values_length: First position.
            position_ids: Positions, ``(seq,)``, instead of the run that starts there.
        """
        if position_ids is None:
            start = past_key_values_length
            position_ids = torch.arange(start, start + shape[1], device=self.device)
        return self.rows(position_ids[None])[0]

    def __getitem__(self, position_ids: Tensor) -> Tensor:
        """Return rows as indexing CodeGen's table does."""
        return self.rows(position_ids)

    def repeat(self, *sizes: int) -> "ExtendedTable":
        """Return the table for a batch, before GPT-J gathers from it."""
        return self

    @property
    def shape(self) -> tuple[int]:
        """The width of a row."""
        return (self.rotations[None].geometry.rotary_dim,)

    @property
    def device(self) -> torch.device:
        """Where the frequencies live."""
        return self.inv_freq.device  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Answer ``torch.gather(table, 1, positions)``, GPT-J's way to look rows up."""
        if func is torch.gather and isinstance(args[0], cls):
            return args[0].rows(args[2][..., 0])
        raise NotImplementedError(f"{func} of a rotary table")

    def _stock_table(self) -> Tensor:
        original = self.__dict__["original"]
        return original.weight if isinstance(original, nn.Embedding) else original
