"""Load a model, and apply the patch that its config or its adapter records."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.family import Config
from hf_rope_ext.models.rope_config import RECORD, STOP
from hf_rope_ext.saving.adapters import SOURCE, load_adapter, save_record
from hf_rope_ext.saving.record import apply_record, merge_records, require_known

ROPE = ("rope_scaling", "rope_parameters")
"""Config keys of the scaling, the older first."""
INNER = ("thinker_config", "text_config")
"""Config keys of a text config."""


def load_pretrained(name_or_path: str | Path, **kwargs: Any) -> nn.Module:
    """Load a model, or a PEFT adapter with its base model, patched as it was when saved.

    Without a record this is plain transformers (or PEFT) loading. Every method can be restored,
    including those that transformers' config cannot express.

    Args:
        name_or_path: Directory or hub id of a model or an adapter.
        **kwargs: Passed to ``from_pretrained``.

    Raises:
        RopeError: If there is nothing to load, or the record is not readable.
    """
    adapter = Path(name_or_path) / "adapter_config.json"
    if adapter.is_file():
        return _load_adapter(Path(name_or_path), **kwargs)
    settings, record, as_found = _read_config(name_or_path, **kwargs)
    changed = None if as_found or "config" in kwargs else settings
    model = _load_model(name_or_path, changed, **kwargs)
    return model if record is None else apply_record(model, record)


def save_pretrained(model: nn.Module, directory: str | Path, **kwargs: Any) -> None:
    """Save a model, or a PEFT adapter together with the record of its patch.

    A plain model needs only its own ``save_pretrained``: its config holds the record. The files of
    a PEFT adapter have no room for it, so it is saved next to them.

    Args:
        model: A patched model or the PEFT model around it.
        directory: Where to save.
        **kwargs: Passed to the model's ``save_pretrained``.
    """
    model.save_pretrained(directory, **kwargs)  # type: ignore[operator]
    save_record(model, directory)


def skeleton(config: Config) -> nn.Module:
    """Build the model of a config without weights, on the meta device."""
    with torch.device("meta"):
        return _model_class(config)._from_config(config)  # type: ignore[no-any-return]


def read_config(name_or_path: str | Path, **kwargs: Any) -> tuple[Config, dict[str, Any] | None]:
    """Return a model's config as before any recorded patch, and the record.

    Raises:
        RopeError: If there is no readable config.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings, record, as_found = _read_config(name_or_path, **kwargs)
    if as_found:
        return AutoConfig.from_pretrained(name_or_path, **kwargs), None
    return CONFIG_MAPPING[settings["model_type"]].from_dict(settings), record


def load_unpatched(name_or_path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, Any]:
    """Load a model as before any recorded patch, and its tokenizer.

    Raises:
        RopeError: If there is nothing to load, or the dtype is invalid.
    """
    from transformers import AutoTokenizer

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise RopeError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    settings, _, _ = _read_config(name_or_path)
    try:
        model = _load_model(name_or_path, settings, dtype=torch_dtype)
        return model.to(device), AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RopeError(f"cannot load {str(name_or_path)!r}: {reason}") from error


def load_processor(name_or_path: str | Path) -> Any:
    """Load the processor of a model that takes images.

    Raises:
        RopeError: If it has none, or it cannot be loaded.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise RopeError(f"cannot load a processor from {str(name_or_path)!r}: {reason}") from error
    if not isinstance(processor, ProcessorMixin):
        raise RopeError(f"{str(name_or_path)!r} has no processor, so it takes no images.")
    return processor


def _read_config(
    name_or_path: str | Path, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any] | None, bool]:
    """Return the settings of a config, the record of a patch, and whether they are as saved.

    The settings are not as saved if a patch was reverted or legacy keys were replaced.
    """
    from transformers import PreTrainedConfig

    source = {key: kwargs[key] for key in SOURCE if key in kwargs}
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
            f"{str(name_or_path)!r} is not a model: it has no config.json with a model_type."
        )
    records: list[dict[str, Any]] = []
    _restore(settings, records)
    for record in records:
        require_known(record, name_or_path)
    older = _modernize(settings)
    return settings, merge_records(records), not (records or older)


def _modernize(settings: dict[str, Any]) -> bool:
    """Replace legacy M-RoPE keys by current ones; return whether there were any.

    Older checkpoints give the layout ``"mrope"`` as the type of scaling, which transformers accepts
    for two families only, or keep it next to the text config, where transformers does not look.
    """
    older = False
    for name in ROPE:
        for rope in _rope_dicts(settings.get(name)):
            if rope.get("rope_type", rope.get("type")) == "mrope":
                rope.pop("type", None)
                rope["rope_type"] = "default"
                older = True
    for inner in (settings.get(name) for name in INNER):
        if not isinstance(inner, dict):
            continue
        beside = [name for name in ROPE if _has_sections(settings.get(name))]
        if beside and not any(_has_sections(inner.get(name)) for name in ROPE):
            rope = {
                **(inner.pop("rope_parameters", None) or {}),
                **(inner.get("rope_scaling") or {}),
            }
            inner["rope_scaling"] = {**settings.pop(beside[0]), **rope}
            for key in ("rope_theta", "partial_rotary_factor"):
                if key in settings and key not in rope:
                    inner.setdefault(key, settings.pop(key))
            older = True
        older = _modernize(inner) or older
    return older


def _rope_dicts(rope: Any) -> list[dict[str, Any]]:
    """Return the individual scalings; nested ``rope_parameters`` hold several."""
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _has_sections(rope: Any) -> bool:
    return any("mrope_section" in part for part in _rope_dicts(rope))


def _restore(settings: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Revert a config, and those inside it, to their settings before the patch."""
    if str(settings.get(STOP)).startswith(RECORD):
        del settings[STOP]
    record = settings.pop(RECORD, None)
    if record is not None:
        records.append(record)
        settings.update(record.get("unscaled", {}))
    for value in settings.values():
        if isinstance(value, dict):
            _restore(value, records)


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
    """Load an adapter and its base model, patched as the record of the adapter says."""
    from peft import PeftConfig

    base = load_pretrained(PeftConfig.from_pretrained(directory).base_model_name_or_path, **kwargs)
    return load_adapter(base, directory)


def _model_class(config: Config) -> Any:
    """Return the class a checkpoint was saved from, or else the first that an auto class maps."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (
        # first, since some composite configs are also mapped to the class of their text model
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModel,
    ):
        model_class = auto._model_mapping.get(type(config), None)
        if model_class is not None:
            return model_class[0] if isinstance(model_class, tuple | list) else model_class
    raise RopeError(f"transformers has no model for model_type={config.model_type!r}.")
