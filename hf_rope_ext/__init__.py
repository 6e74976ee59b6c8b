"""Extend the context of RoPE models: exact, reversible, and saved so that stock tools load it."""

from hf_rope_ext.axial import AxialRope
from hf_rope_ext.caching import planned
from hf_rope_ext.describe import describe
from hf_rope_ext.errors import (
    AlreadyScaledError,
    ExportError,
    MethodParameterError,
    NotPatchedError,
    ProbeError,
    RopeError,
    RopeWarning,
    UnknownMethodError,
    UnsupportedModelError,
)
from hf_rope_ext.export import Export, export
from hf_rope_ext.layouts import MRopeLayout
from hf_rope_ext.lengths import RequestPlan, request_plan
from hf_rope_ext.loading import load_pretrained, save_pretrained
from hf_rope_ext.measuring import RequestLength, request_length
from hf_rope_ext.methods import available_methods
from hf_rope_ext.patching import patch_model, patched, unpatch_model
from hf_rope_ext.positions import VisualPositions, place_visual_tokens
from hf_rope_ext.sizes import Video, visual_length

__version__ = "0.1.0"

__all__ = [
    "AlreadyScaledError",
    "AxialRope",
    "Export",
    "ExportError",
    "MRopeLayout",
    "MethodParameterError",
    "NotPatchedError",
    "ProbeError",
    "RequestLength",
    "RequestPlan",
    "RopeError",
    "RopeWarning",
    "UnknownMethodError",
    "UnsupportedModelError",
    "Video",
    "VisualPositions",
    "available_methods",
    "describe",
    "export",
    "load_pretrained",
    "patch_model",
    "patched",
    "place_visual_tokens",
    "planned",
    "request_length",
    "request_plan",
    "save_pretrained",
    "unpatch_model",
    "visual_length",
]
