"""Load a model and re-apply the patch its config, or its adapter, was saved with."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.family import Config
from hf_rope_ext.models.rope_config import RECORD
from hf_rope_ext.saving.adapters import SOURCE, load_adapter, save_record
from hf_rope_ext.saving.record import apply_record, merge_records, require_known

ROPE = ("rope_scaling", "rope_parameters")
"""Where a config keeps its scaling, the older word first."""
INNER = ("thinker_config", "text_config")
"""Where a config keeps that of its text model."""


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
    settings, record, as_found = _read_config(name_or_path, **kwargs)
    own = None if as_found or "config" in kwargs else settings
    model = _load_model(name_or_path, own, **kwargs)
    return model if record is None else apply_record(model, record)


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

    settings, record, as_found = _read_config(name_or_path, **kwargs)
    if as_found:
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
    settings, _, _ = _read_config(name_or_path)
    try:
        model = _load_model(name_or_path, settings, dtype=number)
        return model.to(device), AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RopeError(f"cannot load {str(name_or_path)!r}: {reason}") from error


def load_processor(name_or_path: str | Path) -> Any:
    """Return the processor of a model that takes images.

    Raises:
        RopeError: If it has none, or it cannot be loaded.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        found = AutoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise RopeError(f"cannot load a processor from {str(name_or_path)!r}: {reason}") from error
    if not isinstance(found, ProcessorMixin):
        raise RopeError(f"{str(name_or_path)!r} has no processor, so it takes no images.")
    return found


def _read_config(
    name_or_path: str | Path, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any] | None, bool]:
    """Return the settings of a config, the record of a patch, and whether they are as found.

    They are not where they were put back to before the patch, or older words put in today's.
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
            f"{str(name_or_path)!r} holds no config.json with a model_type, so it is no model."
        )
    records: list[dict[str, Any]] = []
    _restore(settings, records)
    for record in records:
        require_known(record, name_or_path)
    older = _modernize(settings)
    return settings, merge_records(records), not (records or older)


def _modernize(settings: dict[str, Any]) -> bool:
    """Put M-RoPE as older checkpoints say it in today's words; return whether there was any.

    They give ``"mrope"``, the layout, for the type of scaling, which transformers understands of
    two families only; or they keep it beside the text config, where transformers looks past it.
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
            own = {
                **(inner.pop("rope_parameters", None) or {}),
                **(inner.get("rope_scaling") or {}),
            }
            inner["rope_scaling"] = {**settings.pop(beside[0]), **own}
            for key in ("rope_theta", "partial_rotary_factor"):
                if key in settings and key not in own:
                    inner.setdefault(key, settings.pop(key))
            older = True
        older = _modernize(inner) or older
    return older


def _rope_dicts(rope: Any) -> list[dict[str, Any]]:
    """Return the dictionaries of one scaling each, of which nested ones hold several."""
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _has_sections(rope: Any) -> bool:
    return any("mrope_section" in own for own in _rope_dicts(rope))


def _restore(settings: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Put the settings of a config, and of those inside it, back to before their patch."""
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
    """Load an adapter on its base model, which is patched first as the adapter's record says."""
    from peft import PeftConfig

    base = load_pretrained(PeftConfig.from_pretrained(directory).base_model_name_or_path, **kwargs)
    return load_adapter(base, directory)


def _model_class(config: Config) -> Any:
    """Return the class a checkpoint was saved from, else the causal language model's."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (
        # first, since some whole configs are also listed with the class of their text model
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModel,
    ):
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple | list) else found
    raise RopeError(f"transformers has no model for model_type={config.model_type!r}.")
