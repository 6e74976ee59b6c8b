"""NTK-RoPE-mixed: scaling that grows with a power of the pair index."""

from dataclasses import dataclass

from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry, Scale
from hf_rope_ext.methods.method import Scaling, store_number


@dataclass(frozen=True)
class NTKMixed(Scaling):
    """NTK-RoPE-mixed (Su, 2023, kexue.fm/archives/9706).

    ::

        inv_freq'[i] = inv_freq[i] * factor ** -(((i + 1) / pairs) ** exponent)

    Args:
        factor: Target length over trained length, at least 1; the last pair is slowed by it.
        exponent: Exponent of the growth, above 0; by default 0.75, as in the author's code.
    """

    name = "ntk_mixed"

    exponent: float = 0.75

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        store_number(self, "exponent", above=0.0)

    def stretch(self, geometry: RopeGeometry, scale: Scale) -> FrequencyPlan:
        """Return the scaled frequencies."""
        share = ((geometry.index() + 1) / geometry.pairs) ** self.exponent
        return FrequencyPlan(geometry.inv_freq() * scale**-share)
