"""Checks of arguments: one wording for each kind of mistake.

Each check raises before anything is changed, names the argument and the value it got, and says
what is allowed. Callers with a more specific error class pass it as ``error``.
"""

import difflib
import math
from collections.abc import Iterable
from numbers import Real

from hf_rope_ext.errors import RopeError


def require_choice(
    name: str, value: object, choices: Iterable[object], error: type[RopeError] = RopeError
) -> None:
    """Check that a value is one of a few.

    Raises:
        RopeError: If it is not (``error``).
    """
    allowed = tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise error(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.")


def require_integer(
    name: str,
    value: object,
    least: int,
    most: int | None = None,
    *,
    unit: str = "",
    error: type[RopeError] = RopeError,
) -> None:
    """Check that a value is an integer in a range; booleans and whole floats are not.

    Args:
        name: The argument's name.
        value: Its value.
        least: The smallest value allowed.
        most: The largest value allowed, None for no bound.
        unit: What it counts, such as ``"positions"``.
        error: What to raise.

    Raises:
        RopeError: If it is not (``error``).
    """
    if type(value) is int and value >= least and (most is None or value <= most):
        return
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    counted = f", in {unit}" if unit else ""
    raise error(f"{name} must be an integer {span}{counted}, got {shown(value)}.")


def require_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    error: type[RopeError] = RopeError,
) -> None:
    """Check that a value is a finite number in a range; booleans and numeric strings are not.

    Raises:
        RopeError: If it is not (``error``).
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = _as_float(value)
        if math.isfinite(number) and least <= number <= most and above < number < below:
            return
    words = {"at least": least, "greater than": above, "at most": most, "less than": below}
    bounds = [f"{word} {bound:g}" for word, bound in words.items() if math.isfinite(bound)]
    span = f" {' and '.join(bounds)}" if bounds else ""
    raise error(f"{name} must be a finite number{span}, got {shown(value)}.")


def require_bool(name: str, value: object, error: type[RopeError] = RopeError) -> None:
    """Check that a value is True or False.

    Raises:
        RopeError: If it is not (``error``).
    """
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, got {shown(value)}.")


def shown(value: object, most: int = 200) -> str:
    """Return a value as an error shows it: its ``repr``, or its type where that is a page."""
    text = repr(value)
    return text if len(text) <= most and "\n" not in text else f"an object of {type(value)}"


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def suggest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return a hint at the nearest known word, with a space in front; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
