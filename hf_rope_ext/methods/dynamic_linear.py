"""Position Interpolation, only as far as the request needs."""

from dataclasses import dataclass

from hf_rope_ext.methods.linear import Linear
from hf_rope_ext.methods.method import ClampedScale


@dataclass(frozen=True)
class DynamicLinear(ClampedScale, Linear):
    """Position Interpolation at ``clamp(length / trained, 1, factor)``.

    The scale is the paper's (YaRN, arXiv:2309.00071, sec. 3.3).

    Args:
        factor: The largest stretch, at least 1. Other knobs are those of `Linear`.
    """

    name = "dynamic_linear"

    static = Linear
