"""A PEFT adapter and the RoPE it was trained under, which its own files say nothing about."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.patching.patch import unpatch_model
from hf_rope_ext.patching.resolve import TARGETS
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.record import apply_record, merge_records, require_known

ADAPTER_RECORD = "hf_rope_ext.json"
"""File beside a PEFT adapter that holds the record of the patch it was trained under."""

BASE_WEIGHTS = "base_weights"
"""Key of that file under which the weights of the base model are told from others."""

HASHED = 4096
"""How many numbers of each weight are hashed."""

SOURCE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where files come from."""


def save_record(
    model: nn.Module, directory: str | Path, weights: dict[str, str] | None = None
) -> None:
    """Write the record of a patch beside a saved PEFT adapter.

    Does nothing for an unpatched model, or where no adapter was saved.

    Args:
        model: The PEFT model.
        directory: Where the adapter is.
        weights: The base model's `weights_record`, where it can no longer be taken.
    """
    found = _record(model)
    if found is None or not (Path(directory) / "adapter_config.json").is_file():
        return
    record = {**found, BASE_WEIGHTS: weights or weights_record(model)}
    path = Path(directory) / ADAPTER_RECORD
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(path)


def load_adapter(model: nn.Module, name_or_path: str | Path, **kwargs: Any) -> nn.Module:
    """Put a saved PEFT adapter on a base model in memory, under the RoPE it was trained with.

    Args:
        model: The base model: unpatched, to be patched as the record says, or patched so already.
        name_or_path: Directory or hub id of the adapter.
        **kwargs: Passed to PEFT's ``from_pretrained``.

    Raises:
        RopeError: If the base model is patched in another way, has another geometry or other
            weights than the adapter was trained on, or the record is not understood. The model is
            then as it was.
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
    """Return what tells the weights of a base model from others of the same shapes.

    Adapters do not count. Quantized weights, and those spread over devices or not loaded, have
    none: they cannot be compared with the originals.

    Returns:
        The dtype and a hash of the first numbers of every weight; None where there is none.
    """
    from torch.distributed.tensor import DTensor

    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    digest, dtypes = hashlib.sha256(), set()
    own = {_original_name(name): part for name, part in inner.named_parameters()}
    for name, part in sorted((name, part) for name, part in own.items() if name):
        if part.is_meta or isinstance(part, DTensor) or not part.is_floating_point():
            return None
        dtypes.add(str(part.dtype).removeprefix("torch."))
        first = part.detach().flatten()[:HASHED].to("cpu").contiguous().view(torch.uint8)
        digest.update(name.encode() + first.numpy().tobytes())
    return {"dtype": ",".join(sorted(dtypes)), "sha256": digest.hexdigest()}


def _record(model: nn.Module) -> dict[str, Any] | None:
    """Return the record of a patched model, as JSON gives it back."""
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
    found = _record(model) or {}
    differing = [
        name
        for name in {**found, **record}
        # the length asked for is a label: frequencies follow from the method
        if name != "target_length" and found.get(name) != record.get(name)
    ]
    if differing:
        raise RopeError(
            f"the adapter in {str(source)!r} does not fit this base model: "
            + "; ".join(
                f"{name} was {record.get(name)!r} in training and is {found.get(name)!r} here"
                for name in differing
            )
            + ". Load it with load_pretrained, or on the unpatched base model it was trained on."
        )


def _require_same_weights(
    model: nn.Module, trained_on: dict[str, str] | None, source: str | Path
) -> None:
    """Check weights of the same dtype; another dtype, or quantization, changes every number."""
    found = weights_record(model)
    if trained_on and found and found["dtype"] == trained_on["dtype"] and found != trained_on:
        raise RopeError(
            f"the adapter in {str(source)!r} was trained on a base model with other weights; give "
            f"it that one."
        )


def _original_name(name: str) -> str:
    """Return what a weight is called without PEFT, nothing for the weights of an adapter."""
    if ".lora_" in name or ".modules_to_save." in name:
        return ""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
