"""PEFT adapters with the RoPE they were trained under, which their own files do not record."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.patching.arguments import TARGETS
from hf_rope_ext.patching.patch import unpatch_model
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.record import apply_record, merge_records, require_known

ADAPTER_RECORD = "hf_rope_ext.json"
"""File in the directory of a PEFT adapter that records the patch it was trained under."""

BASE_WEIGHTS = "base_weights"
"""Key in that file for the fingerprint of the base model's weights."""

HASHED = 4096
"""How many numbers of each weight are hashed."""

SOURCE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that select files."""


def save_record(
    model: nn.Module, directory: str | Path, weights: dict[str, str] | None = None
) -> None:
    """Write the record of a patch next to a saved PEFT adapter.

    Does nothing if the model is unpatched or no adapter was saved.

    Args:
        model: The PEFT model.
        directory: Directory of the adapter.
        weights: The `weights_record` of the base model, if it can no longer be computed.
    """
    record = _record(model)
    if record is None or not (Path(directory) / "adapter_config.json").is_file():
        return
    record[BASE_WEIGHTS] = weights or weights_record(model)
    path = Path(directory) / ADAPTER_RECORD
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(path)


def load_adapter(model: nn.Module, name_or_path: str | Path, **kwargs: Any) -> nn.Module:
    """Load a PEFT adapter onto a base model in memory, under the RoPE it was trained with.

    Args:
        model: The base model, either unpatched, to be patched as recorded, or already patched so.
        name_or_path: Directory or hub id of the adapter.
        **kwargs: Passed to PEFT's ``from_pretrained``.

    Raises:
        RopeError: If the base model has a different patch, geometry or weights than the adapter was
            trained on, or the record is not readable. The model is then unchanged.
    """
    from peft import PeftModel
    from transformers.utils import cached_file

    source = {key: kwargs[key] for key in SOURCE if key in kwargs}
    path = cached_file(
        str(name_or_path), ADAPTER_RECORD, _raise_exceptions_for_missing_entries=False, **source
    )
    if path is None:
        return PeftModel.from_pretrained(model, name_or_path, **kwargs)  # type: ignore[no-any-return]
    record = _read_record(Path(path))
    trained_on = record.pop(BASE_WEIGHTS, None)
    patched_before = _record(model) is not None
    if not patched_before:
        apply_record(model, record)
    try:
        _require_same_patch(model, record, name_or_path)
        _require_same_weights(model, trained_on, name_or_path)
        return PeftModel.from_pretrained(model, name_or_path, **kwargs)  # type: ignore[no-any-return]
    except BaseException:
        if not patched_before:
            unpatch_model(model)
        raise


def weights_record(model: nn.Module) -> dict[str, str] | None:
    """Return a fingerprint that tells the weights of a base model from others of the same shapes.

    Adapters are ignored. Quantized, sharded or unloaded weights have none, since they cannot be
    compared with the originals.

    Returns:
        The dtype and a hash of the first numbers of every weight, or None.
    """
    from torch.distributed.tensor import DTensor

    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    digest, dtypes = hashlib.sha256(), set()
    weights = {_original_name(name): weight for name, weight in inner.named_parameters()}
    weights.pop("", None)
    for name, weight in sorted(weights.items()):
        if weight.is_meta or isinstance(weight, DTensor) or not weight.is_floating_point():
            return None
        dtypes.add(str(weight.dtype).removeprefix("torch."))
        first = weight.detach().flatten()[:HASHED].to("cpu").contiguous().view(torch.uint8)
        digest.update(name.encode() + first.numpy().tobytes())
    return {"dtype": ",".join(sorted(dtypes)), "sha256": digest.hexdigest()}


def _record(model: nn.Module) -> dict[str, Any] | None:
    """Return the record of a patched model as it would be read from JSON."""
    patches = [patch for target in TARGETS if (patch := patch_of(model, target))]
    record = merge_records([patch.record for patch in patches])
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RopeError(f"cannot read the RoPE record {str(path)!r}: {error}") from error
    require_known(record, path)
    return record


def _require_same_patch(model: nn.Module, record: dict[str, Any], source: str | Path) -> None:
    current = _record(model) or {}
    differing = [
        name
        for name in {**current, **record}
        # target_length is only a label: the frequencies follow from the method
        if name != "target_length" and current.get(name) != record.get(name)
    ]
    if differing:
        raise RopeError(
            f"the adapter in {str(source)!r} does not match this base model: "
            + "; ".join(
                f"{name} was {record.get(name)!r} in training and is {current.get(name)!r} here"
                for name in differing
            )
            + ". Load it with load_pretrained, or onto its unpatched base model."
        )


def _require_same_weights(
    model: nn.Module, trained_on: dict[str, str] | None, source: str | Path
) -> None:
    """Compare weights of equal dtype; casting or quantization changes every number."""
    weights = weights_record(model)
    same_dtype = trained_on and weights and weights["dtype"] == trained_on["dtype"]
    if same_dtype and weights != trained_on:
        raise RopeError(
            f"the adapter in {str(source)!r} was trained on a base model with other weights; load "
            f"it onto that one."
        )


def _original_name(name: str) -> str:
    """Return the name of a weight without PEFT's additions; empty for an adapter's weight."""
    if ".lora_" in name or ".modules_to_save." in name:
        return ""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
