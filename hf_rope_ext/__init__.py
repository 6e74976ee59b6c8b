"""Extend the context of RoPE models: exact, reversible, and saved so that stock tools load it."""

from hf_rope_ext.axial import AxialRope as AxialRope
from hf_rope_ext.cache.generation import planned
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
from hf_rope_ext.methods import available_methods
from hf_rope_ext.patching.describe import describe
from hf_rope_ext.patching.patch import patch_model, patched, unpatch_model
from hf_rope_ext.planning.request_length import RequestLength, request_length
from hf_rope_ext.planning.visual_length import Video, visual_length
from hf_rope_ext.positions.layouts import MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions
from hf_rope_ext.positions.placement import place_visual_tokens as place_visual_tokens
from hf_rope_ext.rotary.request_plan import RequestPlan, RequestPolicy, request_plan
from hf_rope_ext.saving.engines import Export, export
from hf_rope_ext.saving.loading import load_pretrained, restore_patch, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "AlreadyScaledError",
    "Export",
    "ExportError",
    "MRopeLayout",
    "MethodParameterError",
    "NotPatchedError",
    "ProbeError",
    "RequestLength",
    "RequestPlan",
    "RequestPolicy",
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
    "planned",
    "request_length",
    "request_plan",
    "restore_patch",
    "save_pretrained",
    "unpatch_model",
    "visual_length",
]
