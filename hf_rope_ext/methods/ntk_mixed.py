"""NTK-RoPE-mixed: a slowdown that grows as a power of the pair's index."""

from dataclasses import dataclass

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Stretched, require_real


@dataclass(frozen=True)
class NTKMixed(Stretched):
    """NTK-RoPE-mixed (Su, 2023, kexue.fm/archives/9706).

    ::

        inv_freq'[i] = inv_freq[i] * factor ** -(((i + 1) / pairs) ** exponent)

    Args:
        factor: Target length over trained length, at least 1; the last pair's slowdown.
        exponent: Shape of the growth, above 0; 0.75 as in the author's code.
    """

    name = "ntk_mixed"

    exponent: float = 0.75

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        require_real(self, "exponent", above=0.0)

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the slowed frequencies."""
        share = ((geometry.index() + 1) / geometry.pairs) ** self.exponent
        return FrequencyPlan(geometry.inv_freq() * scale**-share)
