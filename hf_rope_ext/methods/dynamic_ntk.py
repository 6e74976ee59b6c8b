"""NTK-aware scaling, only as far as the request needs."""

from dataclasses import dataclass

from hf_rope_ext.methods.method import ClampedScale
from hf_rope_ext.methods.ntk import NTK


@dataclass(frozen=True)
class DynamicNTK(ClampedScale, NTK):
    """NTK-aware scaling at ``clamp(length / trained, 1, factor)``.

    The scale is the paper's (YaRN, arXiv:2309.00071, sec. 3.3).

    Args:
        factor: The largest stretch, at least 1. Other knobs are those of `NTK`.
    """

    name = "dynamic_ntk"

    static = NTK
