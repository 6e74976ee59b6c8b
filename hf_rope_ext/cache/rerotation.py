"""Rotate cached keys from one plan's angles to another's.

A cached key is ``R(position * inv_freq) k``, so rotating it by the difference of two plans' angles
moves it from one plan to the other. Families differ in which two coordinates of a key rotate
together, with which sign, at which frequency, by which position axis, and in whether the
temperature is included. All of this is measured on the model itself, from the keys of single tokens
under chosen angles. The first layer's keys become exact; deeper layers' keys come from hidden
states computed under the older plan and keep a residual.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import Scale
from hf_rope_ext.models import host
from hf_rope_ext.models.smallest_call import arguments_for
from hf_rope_ext.rotary.extended import ExtendedRotary
from hf_rope_ext.rotary.request_plan import CachePlan, RequestPolicy
from hf_rope_ext.rotary.running import RUNNING, Call

SAMPLES = 16
"""Number of single tokens to run; enough that no two coordinates agree by chance."""
PARTS = ("keys", "values")
"""Tensors of a cache layer; latent attention keeps its rotated part in either of them."""


@dataclass(frozen=True, eq=False)
class KeyRotation:
    """How one tensor of one cache layer rotates, by coordinate of its last dimension.

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


KeyLayout = Mapping[tuple[int, str], KeyRotation]
"""Rotations by cache layer and tensor; tensors that do not rotate are left out."""


def position_axes(rotary: ExtendedRotary) -> int:
    """Return the number of position axes of a rotary embedding."""
    return rotary.axes or 1


def turn_keys(
    cache: Any, layout: KeyLayout, plan: CachePlan, frequencies: Mapping[str, tuple[Tensor, Scale]]
) -> None:
    """Rotate the tensors of a cache from a plan's frequencies to others, in float32.

    Args:
        cache: transformers' cache.
        layout: How its tensors rotate.
        plan: The plan under which it was filled, with the positions of its tokens.
        frequencies: The new frequencies and scaling, by rotary module and layer type.

    Raises:
        RopeError: If the cache keeps its keys in a form that cannot be rotated; nothing is changed.
    """
    for layer in cache.layers:
        if host.is_quantized(layer):
            raise RopeError(
                f"{type(layer).__name__} keeps quantized keys, which cannot be rotated to a longer "
                f"plan; nothing was changed. Run the loop in `planned(max_length)`."
            )
    assert plan.positions is not None
    mixed = any(rotation.mixes_axes() for rotation in layout.values())
    if mixed and bool((plan.positions != plan.positions[:1]).any()):
        raise RopeError(
            "the two coordinates of a pair rotate by different axes of an image's position here, "
            "so its keys cannot be rotated to a longer plan; nothing was changed. Run the loop in "
            "`planned(max_length)`."
        )
    for (index, part), rotation in layout.items():
        held = getattr(cache.layers[index], part)
        setattr(
            cache.layers[index],
            part,
            _turn(held, rotation, plan, *_difference(rotation.key, plan, frequencies)),
        )


def _difference(
    key: str, plan: CachePlan, frequencies: Mapping[str, tuple[Tensor, Scale]]
) -> tuple[Tensor, Scale]:
    old, old_scaling = plan.frequencies[key]
    new, scaling = frequencies[key]
    return new.double() - old.double(), scaling / old_scaling


def _turn(
    held: Tensor, rotation: KeyRotation, plan: CachePlan, step: Tensor, ratio: Scale
) -> Tensor:
    """Return a cached tensor, ``(batch, heads, seq, width)``, rotated by ``step`` per position."""
    assert plan.positions is not None
    device = held.device
    # a layer with a sliding window holds the last tokens only
    positions = plan.positions[..., -held.shape[-2] :].to(device, torch.float64)
    if positions.ndim == 2:
        positions = positions[None]
    per_pair = step.to(device).reshape(-1, 1, step.shape[-1])[..., rotation.pair.to(device)]
    along = positions[rotation.axis.to(device)].movedim(0, -1)
    angles = (along * per_pair)[:, None]
    cos, sin = angles.cos().float(), angles.sin().float()
    numbers = held.float()
    turned = (
        cos * numbers + sin * rotation.gain.to(device) * numbers[..., rotation.partner.to(device)]
    )
    if rotation.is_scaled:
        turned = turned * (ratio[..., None].to(device) if isinstance(ratio, Tensor) else ratio)
    total = plan.positions.shape[-1]
    is_rotated = torch.arange(total - held.shape[-2], total, device=device) >= plan.learned
    turns = rotation.turns.to(device) & is_rotated[:, None]
    return torch.where(turns, turned, numbers).to(held.dtype)


def read_layout(model: nn.Module, rotaries: list[ExtendedRotary]) -> KeyLayout:
    """Measure how a text model's cached keys rotate.

    Args:
        model: The text model; it is run on a few single tokens and left as it was.
        rotaries: Its rotary embeddings.

    Raises:
        RopeError: If its keys do not behave like rotated keys, or the model cannot be run this way.
    """
    if any(
        rotation.layout is not None and rotation.layout.per_head
        for rotary in rotaries
        for rotation in rotary.rotations.values()
    ):
        raise RopeError(
            "the cached keys of heads with different axes cannot be rotated to a longer plan; run "
            "the loop in `planned(max_length)`."
        )
    reader = _Reader(model, rotaries)
    layout: dict[tuple[int, str], KeyRotation] = {}
    try:
        for rotary in rotaries:
            for key, label in rotary.names().items():
                layout.update(reader.rotations_of(key, rotary.rotations[label].geometry.pairs))
    except RopeError:
        raise
    except Exception as error:
        raise RopeError(
            f"could not run {type(model).__name__} on single tokens to measure how its cached "
            f"keys rotate ({type(error).__name__}: {error}); run the loop in `planned(max_length)`."
        ) from error
    return layout


class _Reader:
    """Runs a text model on single tokens at position 1, where the angle equals the frequency.

    A single token attends only to itself, so its values, and with them the inputs of every deeper
    layer, do not depend on the angles: its keys differ by their own rotation and nothing else.
    """

    def __init__(self, model: nn.Module, rotaries: list[ExtendedRotary]) -> None:
        self.model = model
        self.rotaries = rotaries
        self.device = next(rotaries[0].buffers()).device
        self.axes = max(map(position_axes, rotaries))
        self.raw = self._run({})

    def rotations_of(self, key: str, pairs: int) -> dict[tuple[int, str], KeyRotation]:
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
            name: self._key_rotation(
                key, moved, turned[name], self.raw[name], index[name], axis[name], doubled[name]
            )
            for name, moved in moving.items()
        }

    def _key_rotation(
        self,
        key: str,
        moved: Tensor,
        turned: Tensor,
        raw: Tensor,
        pair: Tensor,
        axis: Tensor,
        doubled: Tensor,
    ) -> KeyRotation:
        """Return the rotation of one tensor; ``turned`` and ``raw`` are ``(samples, width)``."""
        norms = raw.norm(dim=0).clamp(min=1e-30)
        likeness = (turned.T @ raw) / (turned.norm(dim=0).clamp(min=1e-30)[:, None] * norms)
        best = likeness.abs().masked_fill(~moved[None, :], 0.0)
        partner = torch.where(moved, best.argmax(dim=1), torch.arange(len(moved)))
        gain = (turned * raw[:, partner]).sum(0) / raw[:, partner].square().sum(0).clamp(min=1e-30)
        predicted = gain * raw[:, partner]
        wrong = (predicted - turned).norm(dim=0) > 0.05 * turned.norm(dim=0)
        if (wrong & moved).any():
            raise RopeError(
                f"the cached keys of {type(self.model).__name__} do not rotate in pairs, so "
                f"they cannot be rotated to a longer plan; run the loop in `planned(max_length)`."
            )
        grew = doubled[:, moved].norm() / turned[:, moved].norm().clamp(min=1e-30)
        return KeyRotation(key, moved, partner, gain, pair, axis, bool(grew > 1.5))

    def _run(
        self, angles: Mapping[str, Tensor], scaling: float = 1.0, axis: int | None = None
    ) -> dict[tuple[int, str], Tensor]:
        """Return what is cached for the tokens, ``(samples, width)``, float32, on the CPU."""
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
        cache = host.new_cache(self.model.config)
        arguments = arguments_for(self.model, self.device)[0]
        arguments = {name: value for name, value in arguments.items() if name != "use_cache"}
        arguments["input_ids"] = torch.arange(1, SAMPLES + 1, device=self.device)[:, None]
        arguments |= {"position_ids": positions, "use_cache": True}
        arguments |= host.pass_cache(self.model, cache)
        outer, RUNNING.call = RUNNING.call, Call(plan, is_noted=True)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.model.forward(**arguments)
        finally:
            RUNNING.call = outer
        cached = {}
        for index, layer in enumerate(cache.layers):
            for part in PARTS:
                held = getattr(layer, part, None)
                if isinstance(held, Tensor) and held.ndim == 4:
                    cached[index, part] = held.reshape(-1, held.shape[-1]).float().cpu()
        return cached


def _nearer(state: Tensor, turned: Tensor, raw: Tensor) -> Tensor:
    """Return, by coordinate, whether a state is nearer to the turned than to the raw one."""
    distance = [(state - other).square().sum(dim=0) for other in (turned, raw)]
    return distance[0] < distance[1]
