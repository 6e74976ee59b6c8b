"""Methods that change the attention and not the frequencies: distances, biases and score scales.

They are modifiers, so that a name such as ``"yarn+streaming+logn"`` is a frequency method, at most
one `AttentionMethod` and any number of `ScoreScale`. An attention method cuts the scores into
`Band`: for each query an interval of key positions, and the positions that the query and those keys
rotate to there. It sees positions, never tensors of a model.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_rope_ext.checks import require_integer
from hf_rope_ext.errors import MethodParameterError, UnknownMethodError
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods.method import Method, Modifier, store_factor
from hf_rope_ext.methods.none import NoScaling

MOST = 2**53
"""The most positions that a knob can count: beyond it, float64 has not every integer."""


@dataclass(frozen=True, eq=False)
class Band:
    """A part of the score matrix. All tensors are float64.

    Args:
        start: First key position that each query sees in it, ``(batch or 1, queries)``; None for
            the first of all.
        stop: Key position from which it sees none in it, ``(batch or 1, queries)``; None for no end
            (later keys than the query are never seen).
        query: Positions that queries rotate to, ``(batch or 1, queries)``; None for their own.
        key: Positions that keys rotate to, ``(batch or 1, keys)``; None for their own.
        query_gain: Exponent by query, ``(batch or 1, queries)``, of the pairs' decay (xPos).
        key_gain: Exponent by key, ``(batch or 1, keys)``.
    """

    start: Tensor | None = None
    stop: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    query_gain: Tensor | None = None
    key_gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Distances:
    """What an attention method is asked about.

    Args:
        query: Positions of the queries, float64, ``(batch or 1, queries)``.
        key: Positions of the keys, float64, ``(batch or 1, keys)``.
        trained: The trained length L in positions.
        length: The length T that the request is planned for, float64, ``(batch or 1, 1)``.
    """

    query: Tensor
    key: Tensor
    trained: int
    length: Tensor


class AttentionSide(Modifier):
    """What is common to attention methods and score scales: frequencies stay as they are."""

    def modify(self, geometry: RopeGeometry, inv_freq: Tensor) -> Tensor:
        """Return the frequencies of the other method."""
        return inv_freq

    @property
    def follows_length(self) -> bool:
        """Whether a knob of its own depends on the length of the request."""
        return False

    @property
    def length_dependent(self) -> bool:
        """Whether the frequencies or a knob depend on the length of the request."""
        return self.follows_length or self.method.length_dependent

    def freeze(self, geometry: RopeGeometry, length: int) -> Method:
        """Return the same rule with the knobs of a request of ``length`` positions."""
        frozen = super().freeze(geometry, length)
        if not self.follows_length:
            return frozen
        factor = max(length / geometry.original_max_position_embeddings, 1.0)
        return replace(frozen, factor=factor)  # type: ignore[type-var]

    def plan(self, geometry: RopeGeometry) -> FrequencyPlan:
        """Return the other method's plan, as this one rotates by it."""
        self.check(geometry)
        planned = self.method.plan(geometry)
        return replace(planned, inv_freq=self.modify(geometry, planned.inv_freq))

    def plan_at(self, geometry: RopeGeometry, length: Tensor) -> FrequencyPlan:
        """Return the other method's plan for requests of given lengths."""
        if self.method.length_dependent:
            return super().plan_at(geometry, length)
        planned = self.plan(geometry)
        return replace(planned, inv_freq=planned.inv_freq.expand(length.shape[0], 1, -1))

    def check(self, geometry: RopeGeometry) -> None:
        """Check the knobs against what was trained.

        Raises:
            MethodParameterError: If one does not suit it.
        """


@dataclass(frozen=True)
class AttentionMethod(AttentionSide):
    """A rule for the distances at which queries see keys; at most one in a name.

    Its bands can be computed at once for all queries of a call: each bound rises with the query.

    Args:
        method: The method whose frequencies it rotates by.
        factor: Target length over trained length. Subclasses choose knobs that are None by it, and
            by the length of each request where it is None too; for others it sets the length limit
            and nothing else.
    """

    counts: ClassVar[tuple[str, ...]] = ()
    """Knobs that are a number of positions, at least 1."""

    method: Method = field(default_factory=NoScaling)
    factor: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs that all have, and those that count positions."""
        store_optional_factor(self)
        require_positions(self, *self.counts)

    def target_length(self, geometry: RopeGeometry) -> int | None:
        """Return the target length of ``factor``, else that of the other method."""
        return Method.target_length(self, geometry) or self.method.target_length(geometry)

    @abc.abstractmethod
    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the bands; intervals of one query do not overlap."""

    def slopes(self, heads: int) -> Tensor | None:
        """Return what is taken from the scores per position of distance, by head, if anything."""
        return None

    def decay(self, geometry: RopeGeometry) -> Tensor | None:
        """Return the base that each pair's gain is a power of, ``(pairs,)``, if it has one."""
        return None


class ScoreScale(AttentionSide):
    """A factor on the scores of each query."""

    needs_rotation = False

    @abc.abstractmethod
    def factors(self, asked: Distances) -> Tensor:
        """Return the factor, float64, ``(batch or 1, queries)``."""


@dataclass(frozen=True)
class AttentionRules:
    """The attention side of a method.

    Args:
        method: The attention method, if there is one.
        scales: The score scales.
    """

    method: AttentionMethod | None = None
    scales: tuple[ScoreScale, ...] = field(default=())

    def bands(self, asked: Distances) -> Sequence[Band]:
        """Return the bands, one of everything if there is no attention method."""
        return (Band(),) if self.method is None else self.method.bands(asked)

    def factors(self, asked: Distances) -> Tensor | None:
        """Return the factor of each query, ``(batch or 1, queries)``, if there is one."""
        product = None
        for rule in self.scales:
            own = rule.factors(asked)
            product = own if product is None else product * own
        return product


def attention_rules(method: Method) -> AttentionRules | None:
    """Return the attention side of a method, None if it has none."""
    rules = AttentionRules()
    part = method
    while isinstance(part, Modifier):
        if isinstance(part, AttentionMethod):
            rules = replace(rules, method=part)
        elif isinstance(part, ScoreScale):
            rules = replace(rules, scales=(*rules.scales, part))
        part = part.method
    return None if rules == AttentionRules() else rules


def seen_distances(method: Method, distances: Tensor, trained: int, last: int) -> Tensor:
    """Return at which distances a query sees keys.

    Args:
        method: A method whose knobs do not follow the length of the request.
        distances: How far the keys are back, ``(keys,)``, at most ``last``.
        trained: The trained length in positions.
        last: Position of the query, the last of its request.

    Returns:
        Float64, ``(keys,)``; NaN for keys that it does not see.
    """
    rules = attention_rules(method)
    query = distances.new_full((1, 1), last, dtype=torch.float64)
    key = last - distances.double()[None]
    seen = torch.full_like(key, torch.nan)
    for band in () if rules is None else rules.bands(Distances(query, key, trained, query + 1)):
        start = -torch.inf if band.start is None else band.start
        stop = torch.inf if band.stop is None else band.stop
        turned = (query if band.query is None else band.query) - (
            key if band.key is None else band.key
        )
        seen = torch.where((key >= start) & (key < stop), turned, seen)
    return distances.double() if rules is None else seen[0]


def require_combination(name: str, classes: Sequence[type[Method]]) -> None:
    """Check that the parts of a name can work together.

    Raises:
        UnknownMethodError: If they cannot.
    """
    chosen = [cls for cls in classes if issubclass(cls, AttentionMethod)]
    if len(chosen) > 1:
        raise UnknownMethodError(
            f"{name!r}: {chosen[0].name!r} and {chosen[1].name!r} both set the distances of the "
            f"attention; name one of them."
        )
    twice = [cls.name for cls in classes if classes.count(cls) > 1]
    if twice:
        raise UnknownMethodError(f"{name!r} names {twice[0]!r} twice; name it once.")
    still = [cls.name for cls in classes if cls.stops_rotation]
    others = [cls.name for cls in classes if cls.needs_rotation]
    if still and others:
        raise UnknownMethodError(
            f"{name!r}: under {still[0]!r} nothing rotates, so {others[0]!r} has nothing to "
            f"change; name one of them."
        )


def require_positions(method: Method, *knobs: str, least: int = 1) -> None:
    """Check that knobs that are given are numbers of positions.

    Raises:
        MethodParameterError: If one is not.
    """
    for knob in knobs:
        value = getattr(method, knob)
        if value is not None:
            name = f"{method.name}: {knob}"
            require_integer(name, value, least, MOST, unit="positions", error=MethodParameterError)


def store_optional_factor(method: AttentionSide) -> None:
    """Check that a factor is None or at least 1, and store it."""
    if method.factor is not None:  # type: ignore[attr-defined]
        store_factor(method)


def targeted(factor: float | None, asked: Distances) -> Tensor:
    """Return the length to make room for: that of ``factor`` or of the request, ``(batch, 1)``."""
    if factor is None:
        return asked.length
    return torch.full_like(asked.length, factor * asked.trained)


def require_within(method: Method, knob: str, value: int, geometry: RopeGeometry) -> None:
    """Check that a number of positions is no more than the trained length.

    Raises:
        MethodParameterError: If it is more.
    """
    trained = geometry.original_max_position_embeddings
    if value > trained:
        raise MethodParameterError(
            f"{method.name}: {knob} must be at most the trained length of {trained} positions, "
            f"got {value}."
        )
