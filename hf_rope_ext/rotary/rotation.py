"""One set of rotary frequencies: method, trained geometry and layout, and what they compute."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods import Method
from hf_rope_ext.positions.layouts import AppliedLayout
from hf_rope_ext.rotary.request_plan import RequestPolicy

UNCHANGED = 1e-12

"""Relative difference of two float64 frequencies that are the same."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """One set of rotary frequencies of a patched model.

    Args:
        method: The method that extends them.
        geometry: What was trained.
        trained: The stock model's frequencies, float32, on the CPU, in the order in which the
            family stores them.
        pair_order: That order, None for the natural one.
        scales_rotation: Whether the temperature goes into cos and sin.
        policy: How a length-dependent method follows requests.
        layout: An M-RoPE layout in place of the family's own, if any.
    """

    method: Method
    geometry: RopeGeometry
    trained: Tensor
    pair_order: list[int] | None = None
    scales_rotation: bool = True
    policy: RequestPolicy = field(default_factory=RequestPolicy)
    layout: AppliedLayout | None = None

    def trained_plan(self) -> tuple[Tensor, float]:
        """Return the static plan, or a length-dependent method's plan within the trained length.

        Returns:
            Frequencies, float32, ``(pairs,)`` (``(axes, pairs)`` where heads have axes), and what
            cos and sin are multiplied by. A pair that the method leaves alone keeps the stock
            buffer's bits, since float64 rounded to float32 can differ from it in the last one.
        """
        plan = self._planned(self.method.plan, self.geometry)
        same = torch.isclose(plan.inv_freq, self.geometry.inv_freq(), rtol=UNCHANGED, atol=0.0)
        frequencies = torch.where(
            self.to_family_order(same), self.trained, self.to_family_order(plan.inv_freq).float()
        )
        return frequencies, float(plan.attention_scaling) if self.scales_rotation else 1.0

    def plan_for(self, lengths: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Scale]:
        """Return the plan of a request.

        Args:
            lengths: Length of each row, ``(batch, 1, 1)``, before it is rounded up.
            inv_freq: What `trained_plan` returned.
            scaling: What `trained_plan` returned.

        Returns:
            Frequencies, float32, ``(batch, 1, pairs)`` (with ``axes`` in front where heads have
            axes), and a number or ``(batch, 1, 1)``.
        """
        trained = self.geometry.original_max_position_embeddings
        lengths = self.policy.round_up(lengths, trained)
        geometry = replace(self.geometry, device=lengths.device)
        plan = self._planned(lambda own: self.method.plan_at(own, lengths), geometry)
        before = self._planned(self.method.plan, geometry).inv_freq
        within, beyond = inv_freq.to(lengths.device), lengths > trained
        if within.ndim == 2:
            within, before = within[:, None, None], before[:, None, None]
        # pairs that do not follow the request, such as those of another axis, keep their bits
        moved = beyond & ~torch.isclose(plan.inv_freq, before, rtol=UNCHANGED, atol=0.0)
        frequencies = torch.where(
            self.to_family_order(moved), self.to_family_order(plan.inv_freq).float(), within
        )
        if not isinstance(plan.attention_scaling, Tensor):
            return frequencies, scaling
        return frequencies, torch.where(beyond, plan.attention_scaling, scaling).float()

    def _planned(
        self, plan: Callable[[RopeGeometry], FrequencyPlan], geometry: RopeGeometry
    ) -> FrequencyPlan:
        """Return the plan under the layout.

        Resting pairs have frequency 0. Where heads have axes, there is a plan for each axis, as if
        all pairs rotated by it.
        """
        planned, layout = plan(geometry), self.layout
        if layout is None:
            return planned
        inv_freq = planned.inv_freq
        if layout.per_head:
            by_axis = [
                plan(replace(geometry, axes=(name,) * geometry.pairs)) for name in layout.names
            ]
            inv_freq = torch.stack([one.inv_freq for one in by_axis])
        elif layout.resting is not None:
            rests = [row == layout.resting for row in layout.rows]
            inv_freq = inv_freq.masked_fill(torch.tensor(rests, device=inv_freq.device), 0.0)
        return replace(planned, inv_freq=inv_freq)

    def drop_unused_axes(self, inv_freq: Tensor) -> Tensor:
        """Drop the frequencies of axes that no head rotates by."""
        if self.layout is None or not self.layout.per_head:
            return inv_freq
        return inv_freq[sorted(set(self.layout.rows))]

    def to_family_order(self, per_pair: Tensor) -> Tensor:
        """Return per-pair values in the order in which the family stores pairs."""
        return per_pair if self.pair_order is None else per_pair[..., self.pair_order]
