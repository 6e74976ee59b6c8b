"""Encodings of position side by side, as pure functions on tensors.

References to read and to test against. They need torch alone, know no model and keep no state.
Positions and distances are counted in tokens; queries and keys are ``(..., seq, head_dim)``.
"""

from hf_rope_ext.axial import AxialRope
from hf_rope_ext.encodings.absolute import learned_table, look_up, sinusoidal
from hf_rope_ext.encodings.bias import alibi_bias, t5_bias, t5_buckets
from hf_rope_ext.encodings.linear import (
    elu_features,
    linear_attention,
    performer_features,
    performer_projection,
)
from hf_rope_ext.encodings.rotary import (
    halves_to_pairs,
    pairs_to_halves,
    rope_angles,
    rotate_complex,
    rotate_halves,
    rotate_pairs,
    rotation_matrix,
    xpos_scales,
)
from hf_rope_ext.methods.alibi import alibi_slopes

__all__ = [
    "AxialRope",
    "alibi_bias",
    "alibi_slopes",
    "elu_features",
    "halves_to_pairs",
    "learned_table",
    "linear_attention",
    "look_up",
    "pairs_to_halves",
    "performer_features",
    "performer_projection",
    "rope_angles",
    "rotate_complex",
    "rotate_halves",
    "rotate_pairs",
    "rotation_matrix",
    "sinusoidal",
    "t5_bias",
    "t5_buckets",
    "xpos_scales",
]
