"""YaRN, only as far as the request needs."""

from dataclasses import dataclass

from hf_rope_ext.methods.method import ClampedScale
from hf_rope_ext.methods.yarn import Yarn


@dataclass(frozen=True)
class DynamicYarn(ClampedScale, Yarn):
    """YaRN at ``clamp(length / trained, 1, factor)``.

    The scale is the paper's (YaRN, arXiv:2309.00071, sec. 3.3).

    Args:
        factor: The largest stretch, at least 1. Other knobs are those of `Yarn`.
    """

    name = "dynamic_yarn"

    static = Yarn
