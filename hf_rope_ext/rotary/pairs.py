"""How queries and keys rotate, coordinate by coordinate, measured on the model itself.

Families differ in which two coordinates rotate together, with which sign, at which frequency, by
which position axis, and in whether the temperature is included. All of it is seen from what single
tokens become under chosen angles, so no family need be named.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.smallest_call import arguments_for
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.request_plan import CachePlan, RequestPolicy
from hf_rope_ext.rotary.running import RUNNING, Call

SAMPLES = 16
"""Number of single tokens to run; enough that no two coordinates agree by chance."""


@dataclass(frozen=True, eq=False)
class PairRotation:
    """How a tensor rotates, by coordinate of its last dimension.

    Args:
        key: Key of the frequencies that rotate it, by rotary module and layer type.
        turns: Whether the coordinate rotates at all.
        partner: The coordinate it rotates together with.
        gain: Factor on the partner in a quarter turn: plus or minus one, times the weight of a norm
            after the rotation.
        pair: Index of its frequency.
        axis: Its position axis, 0 for text.
        is_scaled: Whether it is multiplied by the attention scaling.
    """

    key: str
    turns: Tensor
    partner: Tensor
    gain: Tensor
    pair: Tensor
    axis: Tensor
    is_scaled: bool

    def mixes_axes(self) -> bool:
        """Return whether the two coordinates of a pair rotate by different position axes."""
        return bool((self.axis[self.partner] != self.axis)[self.turns].any())


def position_axes(rotary: ExtendedRotary) -> int:
    """Return the number of position axes of a rotary embedding."""
    return rotary.axes or 1


Observe = Callable[[dict[str, object]], Mapping[Hashable, Tensor]]
"""Runs the model on arguments and returns tensors of its tokens, ``(samples, width)``, float32, on
the CPU, by any name."""


class PairReader:
    """Runs a text model on single tokens at position 1, where the angle equals the frequency.

    A single token attends only to itself, so its values, and with them the inputs of every deeper
    layer, do not depend on the angles: its queries and keys differ by their own rotation and
    nothing else.

    Args:
        model: The text model; it is left as it was.
        rotaries: Its rotary embeddings.
        observe: How to run it, and what to look at.
    """

    def __init__(
        self, model: nn.Module, rotaries: Sequence[ExtendedRotary], observe: Observe
    ) -> None:
        self.model = model
        self.rotaries = rotaries
        self.observe = observe
        self.device = next(rotaries[0].buffers()).device
        self.axes = max(map(position_axes, rotaries))
        self.raw = self._run({})

    def rotations(self) -> dict[Hashable, PairRotation]:
        """Return the rotations of all tensors that rotate.

        Raises:
            RopeError: If one does not behave like rotated pairs.
        """
        found: dict[Hashable, PairRotation] = {}
        for rotary in self.rotaries:
            for key, label in rotary.names().items():
                found |= self._rotations_of(key, rotary.rotations[label].geometry.pairs)
        return found

    def _rotations_of(self, key: str, pairs: int) -> dict[Hashable, PairRotation]:
        """Return the rotations of all tensors that one set of frequencies rotates."""
        quarter = torch.full((pairs,), math.pi / 2)
        turned = self._run({key: quarter})
        moving = {}
        for name, raw in self.raw.items():
            moved = (turned[name] - raw).abs().amax(dim=0) > 1e-2 * raw.abs().amax(dim=0)
            if moved.any():
                moving[name] = moved
        if not moving:
            return {}
        # read the index of each coordinate's frequency bit by bit: run once per bit, with a quarter
        # turn for the pairs whose index has it and none for the others
        index = {name: torch.zeros(len(moved), dtype=torch.int64) for name, moved in moving.items()}
        for bit in range(max(pairs - 1, 1).bit_length()):
            chosen = quarter * ((torch.arange(pairs) >> bit) & 1)
            state = self._run({key: chosen})
            for name in moving:
                index[name] += _nearer(state[name], turned[name], self.raw[name]).long() << bit
        axis = {name: torch.zeros(len(moved), dtype=torch.int64) for name, moved in moving.items()}
        for number in range(1, self.axes):
            state = self._run({key: quarter}, axis=number)
            for name in moving:
                axis[name][_nearer(state[name], turned[name], self.raw[name])] = number
        doubled = self._run({key: quarter}, scaling=2.0)
        return {
            name: self._pair_rotation(
                key, moved, turned[name], self.raw[name], index[name], axis[name], doubled[name]
            )
            for name, moved in moving.items()
        }

    def _pair_rotation(
        self,
        key: str,
        moved: Tensor,
        turned: Tensor,
        raw: Tensor,
        pair: Tensor,
        axis: Tensor,
        doubled: Tensor,
    ) -> PairRotation:
        """Return the rotation of one tensor; ``turned`` and ``raw`` are ``(samples, width)``."""
        norms = raw.norm(dim=0).clamp(min=1e-30)
        likeness = (turned.T @ raw) / (turned.norm(dim=0).clamp(min=1e-30)[:, None] * norms)
        best = likeness.abs().masked_fill(~moved[None, :], 0.0)
        partner = torch.where(moved, best.argmax(dim=1), torch.arange(len(moved)))
        gain = (turned * raw[:, partner]).sum(0) / raw[:, partner].square().sum(0).clamp(min=1e-30)
        predicted = gain * raw[:, partner]
        wrong = (predicted - turned).norm(dim=0) > 0.05 * turned.norm(dim=0)
        if (wrong & moved).any():
            raise RopeError(f"those of {type(self.model).__name__} do not rotate in pairs")
        grew = doubled[:, moved].norm() / turned[:, moved].norm().clamp(min=1e-30)
        return PairRotation(key, moved, partner, gain, pair, axis, bool(grew > 1.5))

    def _run(
        self, angles: Mapping[str, Tensor], scaling: float = 1.0, axis: int | None = None
    ) -> Mapping[Hashable, Tensor]:
        """Return what is observed under chosen angles."""
        plan = CachePlan("", 1, RequestPolicy(), 1)
        for rotary in self.rotaries:
            for key, label in rotary.names().items():
                rest = torch.zeros(rotary.rotations[label].geometry.pairs)
                chosen = angles.get(key, rest).to(self.device)
                plan.frequencies[key] = (chosen, scaling if key in angles else 1.0)
        positions = torch.ones(SAMPLES, 1, dtype=torch.int64, device=self.device)
        if self.axes > 1:
            positions = positions.repeat(self.axes, 1, 1)
            if axis is not None:
                positions[:axis] = 0
                positions[axis + 1 :] = 0
        arguments = arguments_for(self.model, self.device)[0]
        arguments = {name: value for name, value in arguments.items() if name != "use_cache"}
        arguments["input_ids"] = torch.arange(1, SAMPLES + 1, device=self.device)[:, None]
        arguments["position_ids"] = positions
        outer, RUNNING.call = RUNNING.call, Call(plan, is_noted=True)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return self.observe(arguments)
        finally:
            RUNNING.call = outer


def _nearer(state: Tensor, turned: Tensor, raw: Tensor) -> Tensor:
    """Return, by coordinate, whether a state is nearer to the turned than to the raw one."""
    distance = [(state - other).square().sum(dim=0) for other in (turned, raw)]
    return distance[0] < distance[1]
