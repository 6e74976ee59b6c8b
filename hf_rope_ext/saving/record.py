"""Validate the record of a patch, which configs and adapters store, and apply it."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.methods import Method, method_from_record
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.positions.layouts import MRopeLayout
from hf_rope_ext.positions.placement import VisualPositions

RECORD_VERSION = 1


def recorded_method(record: dict[str, Any]) -> Method:
    """Return the method of a record."""
    return method_from_record(record["method"])


def apply_record(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Patch a model as recorded."""
    if "vision" in record:
        apply_record(model, record["vision"])
    layout, visual = record.get("mrope_layout"), record.get("visual_positions")
    return patch_model(
        model,
        recorded_method(record),
        target_length=record.get("target_length"),
        original_max_position_embeddings=record["original_max_position_embeddings"],
        layer_types=record.get("layer_types"),
        temperature=record["temperature"],
        replace=True,
        target=record.get("target", "text"),
        mrope_layout=None if layout is None else MRopeLayout(**layout),
        visual_positions=None if visual is None else VisualPositions(**visual),
        **record.get("lengths", {}),
    )


def require_known(record: Any, source: str | Path) -> None:
    """Check that a record has a readable version.

    Raises:
        RopeError: If it has not.
    """
    if not isinstance(record, dict) or record.get("version") != RECORD_VERSION:
        raise RopeError(
            f"{str(source)!r} holds a RoPE record this version does not know "
            f"({record!r}); install the version of hf-rope-ext that wrote it, or a newer one."
        )
    missing = {"method", "original_max_position_embeddings", "temperature"} - record.keys()
    if missing:
        raise RopeError(f"the RoPE record of {str(source)!r} lacks {', '.join(sorted(missing))}.")
