"""Load a model and re-apply the patch its config, or its adapter, was saved with."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.checkpoint import RECORD
from hf_rope_ext.errors import RopeError
from hf_rope_ext.families import Config
from hf_rope_ext.methods import Method, make_method
from hf_rope_ext.patching import patch_model, patch_of, unpatch_model

ADAPTER_RECORD = "hf_rope_ext.json"
"""File beside a PEFT adapter that holds the record of the patch it was trained under."""

RECORD_VERSION = 1

BASE_WEIGHTS = "base_weights"
"""Key of that file under which the weights of the base model are told from others."""

HASHED = 4096
"""How many numbers of each weight are hashed."""


def load_pretrained(name_or_path: str | Path, **kwargs: Any) -> nn.Module:
    """Load a model, or a PEFT adapter with its base model, patched as it was when saved.

    Without a record this is transformers' (or PEFT's) own loading. Any method can be restored,
    those that transformers' config cannot express included.

    Args:
        name_or_path: Directory or hub id of a model or of an adapter.
        **kwargs: Passed to ``from_pretrained``.

    Raises:
        RopeError: If there is nothing to load, or the record is not understood.
    """
    adapter = Path(name_or_path) / "adapter_config.json"
    if adapter.is_file():
        return _load_adapter(Path(name_or_path), **kwargs)
    settings, record = _read_config(name_or_path, **kwargs)
    model = _load_model(name_or_path, settings if record else None, **kwargs)
    return model if record is None else _apply(model, record)


def save_pretrained(model: nn.Module, directory: str | Path, **kwargs: Any) -> None:
    """Save a model, or a PEFT adapter together with the record of the patch under it.

    A plain model needs nothing but its own ``save_pretrained``: its config holds the record. A
    PEFT adapter's files say nothing about RoPE, so the record goes beside them.

    Args:
        model: A patched model or the PEFT model around it.
        directory: Where to.
        **kwargs: Passed to the model's ``save_pretrained``.
    """
    model.save_pretrained(directory, **kwargs)  # type: ignore[operator]
    save_record(model, directory)


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
    patch = patch_of(model)
    if patch is None or not (Path(directory) / "adapter_config.json").is_file():
        return
    record = {**_record(model), BASE_WEIGHTS: weights or weights_record(model)}
    path = Path(directory) / ADAPTER_RECORD
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(path)


def load_adapter(model: nn.Module, directory: str | Path, **kwargs: Any) -> nn.Module:
    """Put a saved PEFT adapter on a base model in memory, under the RoPE it was trained with.

    Args:
        model: The base model: unpatched, to be patched as the record says, or patched so already.
        directory: Of the adapter.
        **kwargs: Passed to PEFT's ``from_pretrained``.

    Raises:
        RopeError: If the base model is patched in another way, has another geometry or other
            weights than the adapter was trained on, or the record is not understood. The model is
            then as it was.
    """
    from peft import PeftModel

    path = Path(directory) / ADAPTER_RECORD
    if not path.is_file():
        return PeftModel.from_pretrained(model, directory, **kwargs)  # type: ignore[no-any-return]
    record = _read_record(path)
    trained_on = record.pop(BASE_WEIGHTS, None)
    patched_before = patch_of(model) is not None
    if not patched_before:
        _apply(model, record)
    try:
        _require_same_patch(model, record, directory)
        _require_same_weights(model, trained_on, directory)
        return PeftModel.from_pretrained(model, directory, **kwargs)  # type: ignore[no-any-return]
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


def skeleton(config: Config) -> nn.Module:
    """Return a model of this config without weights, on the meta device."""
    with torch.device("meta"):
        return _model_class(config)._from_config(config)  # type: ignore[no-any-return]


def read_config(name_or_path: str | Path, **kwargs: Any) -> tuple[Config, dict[str, Any] | None]:
    """Return a model's config as it was before a recorded patch, and the record.

    Raises:
        RopeError: If there is no config to read.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings, record = _read_config(name_or_path, **kwargs)
    if record is None:
        return AutoConfig.from_pretrained(name_or_path, **kwargs), None
    return CONFIG_MAPPING[settings["model_type"]].from_dict(settings), record


def load_unpatched(name_or_path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, Any]:
    """Return a model as it was before any recorded patch, and its tokenizer.

    Raises:
        RopeError: If there is nothing to load, or no such dtype.
    """
    from transformers import AutoTokenizer

    number = getattr(torch, dtype, None)
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise RopeError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    settings, _ = _read_config(name_or_path)
    try:
        model = _load_model(name_or_path, settings, dtype=number)
        return model.to(device), AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RopeError(f"cannot load {str(name_or_path)!r}: {reason}") from error


def recorded_method(record: dict[str, Any]) -> Method:
    """Return the method of a record."""
    values = dict(record["method"])
    return make_method(values.pop("name"), **values)


def _read_config(
    name_or_path: str | Path, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the settings of a config as before a recorded patch, and the record."""
    from transformers import PreTrainedConfig

    source = {
        key: kwargs[key]
        for key in (
            "cache_dir",
            "force_download",
            "local_files_only",
            "revision",
            "subfolder",
            "token",
        )
        if key in kwargs
    }
    if isinstance(name_or_path, Path) and not name_or_path.is_dir():
        raise RopeError(f"{str(name_or_path)!r} is not a directory.")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(str(name_or_path), **source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RopeError(
            f"cannot read a model's config from {str(name_or_path)!r}: {reason}"
        ) from error
    if "model_type" not in settings:
        raise RopeError(
            f"{str(name_or_path)!r} holds no config.json with a model_type, so it is no model."
        )
    records: list[dict[str, Any]] = []
    _restore(settings, records)
    for record in records:
        _require_known(record, name_or_path)
    return settings, records[0] if records else None


def _restore(settings: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Put the settings of a config, and of those inside it, back to before their patch."""
    record = settings.pop(RECORD, None)
    if record is not None:
        records.append(record)
        settings.update(record.get("unscaled", {}))
    for value in settings.values():
        if isinstance(value, dict):
            _restore(value, records)


def _require_known(record: Any, source: str | Path) -> None:
    if not isinstance(record, dict) or record.get("version") != RECORD_VERSION:
        raise RopeError(
            f"{str(source)!r} holds a RoPE record this version does not know "
            f"({record!r}); install the hf-rope-ext that wrote it, or a newer one."
        )


def _load_model(
    name_or_path: str | Path, settings: dict[str, Any] | None, **kwargs: Any
) -> nn.Module:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if settings is None:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name_or_path, **kwargs)
    else:
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    model: nn.Module = _model_class(config).from_pretrained(name_or_path, config=config, **kwargs)
    return model


def _load_adapter(directory: Path, **kwargs: Any) -> nn.Module:
    """Load an adapter on its base model, which is patched first as the adapter's record says."""
    from peft import PeftConfig

    base = load_pretrained(PeftConfig.from_pretrained(directory).base_model_name_or_path, **kwargs)
    return load_adapter(base, directory)


def _record(model: nn.Module) -> dict[str, Any]:
    """Return the record of a patched model, as JSON gives it back."""
    patch = patch_of(model)
    attributes = patch.resolved.configs[0].attributes if patch else {}
    record: dict[str, Any] = json.loads(json.dumps(attributes.get(RECORD)))
    return record


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RopeError(f"cannot read the RoPE record {str(path)!r}: {error}") from error
    _require_known(record, path)
    missing = {"method", "original_max_position_embeddings", "temperature"} - record.keys()
    if missing:
        raise RopeError(f"the RoPE record {str(path)!r} lacks {', '.join(sorted(missing))}.")
    return record


def _require_same_patch(model: nn.Module, record: dict[str, Any], source: str | Path) -> None:
    found = _record(model)
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


def _apply(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    return patch_model(
        model,
        recorded_method(record),
        target_length=record.get("target_length"),
        original_max_position_embeddings=record["original_max_position_embeddings"],
        layer_types=record.get("layer_types"),
        temperature=record["temperature"],
        replace=True,
    )


def _model_class(config: Config) -> Any:
    """Return the class a checkpoint was saved from, else the causal language model's."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModel,
    ):
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple | list) else found
    raise RopeError(f"transformers has no model for model_type={config.model_type!r}.")
