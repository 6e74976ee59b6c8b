"""PEFT adapters with the RoPE they were trained under, which their own files do not record."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.patching.adapter_record import (
    ADAPTER_CONFIG,
    ADAPTER_RECORD,
    BASE_WEIGHTS,
    MARK,
    live_record,
    weights_record,
)
from hf_rope_ext.patching.patch import unpatch_model
from hf_rope_ext.saving.record import apply_record, require_known

SOURCE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that select files."""


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

    source = {key: kwargs[key] for key in SOURCE if key in kwargs}
    record = read_adapter_record(name_or_path, **source)
    if record is None:
        return PeftModel.from_pretrained(model, name_or_path, **kwargs)  # type: ignore[no-any-return]
    trained_on = record.pop(BASE_WEIGHTS, None)
    _require_same_weights(model, trained_on, name_or_path)
    with applied(model, record, name_or_path), mark_read():
        return PeftModel.from_pretrained(model, name_or_path, **kwargs)  # type: ignore[no-any-return]


def read_adapter_record(name_or_path: str | Path, **source: Any) -> dict[str, Any] | None:
    """Return the record beside an adapter, with the fingerprint of its base's weights.

    Args:
        name_or_path: Directory or hub id of the adapter.
        **source: Arguments of ``from_pretrained`` that select files.

    Returns:
        The record; None if the base model was not patched in training.

    Raises:
        RopeError: If the record is lost or not readable.
    """
    settings = read_adapter_config(name_or_path, **source) or {}
    path = find_file(name_or_path, ADAPTER_RECORD, **source)
    if path is not None:
        return _read_record(path)
    if MARK in settings:
        raise RopeError(
            f"the adapter in {str(name_or_path)!r} was trained under a RoPE patch, but its record "
            f"{ADAPTER_RECORD} is missing; copy that file beside {ADAPTER_CONFIG}."
        )
    return None


def read_adapter_config(name_or_path: str | Path, **source: Any) -> dict[str, Any] | None:
    """Return PEFT's config of an adapter; None if there is no adapter."""
    path = find_file(name_or_path, ADAPTER_CONFIG, **source)
    return None if path is None else json.loads(path.read_text())


def adapter_base(name_or_path: str | Path, **source: Any) -> str:
    """Return the name or path of an adapter's base model.

    Raises:
        RopeError: If the adapter does not say.
    """
    settings = read_adapter_config(name_or_path, **source) or {}
    if not settings.get("base_model_name_or_path"):
        raise RopeError(
            f"the adapter in {str(name_or_path)!r} does not name its base model; load that, and "
            f"then the adapter onto it with load_adapter."
        )
    return str(settings["base_model_name_or_path"])


def find_file(name_or_path: str | Path, name: str, **source: Any) -> Path | None:
    """Return a file of a directory or hub repository; None if it has none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            str(name_or_path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **source,
        )
    except OSError:  # no such place, which whoever reads the config tells better
        return None
    return None if path is None else Path(path)


@contextmanager
def mark_read() -> Iterator[None]:
    """Silence PEFT's warning of the mark in the ``with`` block, where the record has been read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", rf".*{re.escape(MARK)}")
        yield


@contextmanager
def applied(model: nn.Module, record: dict[str, Any], source: Any) -> Iterator[None]:
    """Patch a model as recorded, unless it is; undo that on an error in the ``with`` block.

    Raises:
        RopeError: If the model has another patch or geometry.
    """
    patched_before = live_record(model) is not None
    if not patched_before:
        apply_record(model, record)
    try:
        _require_same_patch(model, record, source)
        yield
    except BaseException:
        if not patched_before:
            unpatch_model(model)
        raise


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RopeError(f"cannot read the RoPE record {str(path)!r}: {error}") from error
    require_known(record, path)
    return record


def _require_same_patch(model: nn.Module, record: dict[str, Any], source: Any) -> None:
    current = live_record(model) or {}
    differing = [
        name
        for name in {**current, **record}
        # target_length is only a label: the frequencies follow from the method
        if name != "target_length" and current.get(name) != record.get(name)
    ]
    if differing:
        raise RopeError(
            f"the RoPE recorded in {str(source)!r} does not fit this model: "
            + "; ".join(
                f"{name} was {record.get(name)!r} in training and is {current.get(name)!r} here"
                for name in differing
            )
            + ". Load it with load_pretrained, or onto the unpatched model."
        )


def _require_same_weights(
    model: nn.Module, trained_on: dict[str, Any] | None, source: str | Path
) -> None:
    """Compare weights of equal dtype; casting or quantization changes every number."""
    if trained_on is None or "hashes" not in trained_on:
        return
    weights, hashes = weights_record(model), trained_on["hashes"]
    if weights is None or weights["dtype"] != trained_on["dtype"]:
        return
    # the model may have more: an adapter can hold new values of some
    lost: Counter[str] = Counter(hashes) - Counter(weights["hashes"])
    if lost:
        raise RopeError(
            f"the adapter in {str(source)!r} was trained on a base model with other weights "
            f"({lost.total()} of {len(hashes)} differ); load it onto that one."
        )
