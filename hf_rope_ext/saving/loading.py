"""Load a model, and apply the patch that its config or its adapter records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.family import Config
from hf_rope_ext.patching.adapter_record import BASE_WEIGHTS
from hf_rope_ext.saving.adapters import (
    SOURCE,
    adapter_base,
    applied,
    load_adapter,
    mark_read,
    read_adapter_config,
    read_adapter_record,
)
from hf_rope_ext.saving.classes import class_of_base, find_class
from hf_rope_ext.saving.configs import CODE, SavedConfig, revert_config
from hf_rope_ext.saving.configs import read_config as read_config
from hf_rope_ext.saving.record import apply_record

NOT_CONFIG = ("dtype", "torch_dtype", "quantization_config")
"""Arguments of ``from_pretrained`` that are for the weights, and are also entries of configs."""

PLACE = ("revision", "subfolder")
"""Arguments of ``from_pretrained`` that an adapter on the hub does not share with its base."""


def load_pretrained(
    name_or_path: str | Path | None, *, model_class: Any = None, **kwargs: Any
) -> Any:
    """Load a model, or a PEFT adapter with its base model, patched as it was when saved.

    Without a record this is plain transformers (or PEFT) loading. Every method can be restored,
    including those that transformers' config cannot express.

    Args:
        name_or_path: Directory or hub id of a model or an adapter; None to build a model from
            ``config=`` and ``state_dict=``.
        model_class: The class of the model, or an auto class; by default that which saved it.
        **kwargs: All that ``from_pretrained`` takes, entries of the config included.

    Returns:
        The model; with ``output_loading_info=True`` a pair of it and that information.

    Raises:
        RopeError: If there is nothing to load, the record is not readable, or the class that saved
            the model is not known and another one does not fit.
    """
    source = {key: kwargs[key] for key in SOURCE if key in kwargs}
    adapter = None if name_or_path is None else read_adapter_config(name_or_path, **source)
    if adapter is not None and name_or_path is not None:
        return _load_with_adapter(name_or_path, adapter, model_class, kwargs)
    return _load(name_or_path, model_class, kwargs)


def save_pretrained(model: nn.Module, directory: str | Path, **kwargs: Any) -> None:
    """Save a model, or a PEFT adapter together with the record of its patch.

    The same as the model's own ``save_pretrained``, with which a patched model writes its record.

    Args:
        model: A patched model or the PEFT model around it.
        directory: Where to save.
        **kwargs: Passed to the model's ``save_pretrained``.
    """
    model.save_pretrained(directory, **kwargs)  # type: ignore[operator]


def restore_patch(model: nn.Module, source: str | Path | Config | Mapping[str, Any]) -> nn.Module:
    """Patch a model that was loaded otherwise as a saved one was.

    Args:
        model: An unpatched model, from weights and from the config before the patch; or one that
            already has the patch.
        source: Directory or hub id of a model or an adapter; or a config, also as a dictionary.

    Returns:
        ``model``.

    Raises:
        RopeError: If there is no record, or the model has another patch or geometry. The model is
            then unchanged.
    """
    record = _find_record(source)
    if record is None:
        raise RopeError(f"{_named(source)} holds no record of a patch; nothing was changed.")
    record.pop(BASE_WEIGHTS, None)
    with applied(model, record, _named(source)):
        return model


def skeleton(config: Config) -> nn.Module:
    """Build the model of a config without weights, on the meta device.

    Raises:
        RopeError: If the config describes none.
    """
    try:
        with torch.device("meta"):
            return find_class(config)[0]._from_config(config)  # type: ignore[no-any-return]
    except RopeError:
        raise
    except Exception as error:  # whatever a family makes of a value that it does not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RopeError(
            f"no model can be built from this {config.model_type!r} config: {reason}"
        ) from error


def load_unpatched(name_or_path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, Any]:
    """Load a model as before any recorded patch, and its tokenizer.

    Raises:
        RopeError: If there is nothing to load, or the dtype is invalid.
    """
    from transformers import AutoTokenizer

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise RopeError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    config, _ = read_config(name_or_path)
    try:
        model = _build(name_or_path, config, None, {"dtype": torch_dtype})[0]
        return model.to(device), AutoTokenizer.from_pretrained(name_or_path)
    except RopeError:
        raise
    except Exception as error:  # corrupt files raise types of their own formats
        reason = " ".join(str(error).split())
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


def _load(name_or_path: str | Path | None, model_class: Any, kwargs: dict[str, Any]) -> Any:
    """Load a model without adapters."""
    wants_information = kwargs.get("output_loading_info", False)
    config, record, kwargs = _read(name_or_path, kwargs)
    model, information = _build(name_or_path, config, model_class, kwargs)
    if record is not None:
        apply_record(model, record)
    return (model, information) if wants_information else model


def _read(
    name_or_path: str | Path | None, kwargs: dict[str, Any]
) -> tuple[Config, dict[str, Any] | None, dict[str, Any]]:
    """Return the config as before any patch, the record, and the arguments that remain."""
    from transformers import AutoConfig, PreTrainedConfig

    given = kwargs.get("config")
    if isinstance(given, PreTrainedConfig):
        rest = {key: value for key, value in kwargs.items() if key != "config"}
        config, record = revert_config(given)
        if record is None and name_or_path is not None:
            record = _record_of_model(name_or_path, kwargs)
        return config, record, rest
    place = given or name_or_path
    if place is None:
        raise RopeError("pass a directory or hub id, or config= and state_dict=.")
    kept = {key: kwargs[key] for key in NOT_CONFIG if key in kwargs}
    entries = {key: value for key, value in kwargs.items() if key not in (*kept, "config")}
    source = {key: kwargs[key] for key in (*CODE, "gguf_file") if key in kwargs}
    saved = SavedConfig.read(place, **kwargs)
    if saved.as_found:
        known = AutoConfig.from_pretrained(place, return_unused_kwargs=True, **entries)
    else:
        own = saved.config_class(place, **kwargs)
        known = own.from_dict(saved.settings, return_unused_kwargs=True, **entries)
    config, rest = known
    return config, saved.record, {**rest, **source, **kept}


def _build(
    name_or_path: str | Path | None, config: Config, model_class: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Load the weights; return the model and what was found of its weights.

    Raises:
        RopeError: If the class is a guess and some of its weights were not saved.
    """
    found, exact = (model_class, True) if model_class else find_class(config, **kwargs)
    arguments = {**kwargs, "output_loading_info": True}
    place = None if name_or_path is None else str(name_or_path)
    model, information = found.from_pretrained(place, config=config, **arguments)
    missing = sorted(information["missing_keys"])
    if missing and not exact:
        saved_by = ", ".join(getattr(config, "architectures", None) or ["an unknown class"])
        raise RopeError(
            f"{place!r} was saved by {saved_by}, and {found.__name__} would start with random "
            f"weights ({', '.join(missing[:3])}); pass model_class."
        )
    return model, information


def _load_with_adapter(
    name_or_path: str | Path, settings: dict[str, Any], model_class: Any, kwargs: dict[str, Any]
) -> Any:
    """Load an adapter and its base model, patched as the record of the adapter says."""
    local = Path(name_or_path)
    if (local / "config.json").is_file():
        return _load_beside(local, model_class, kwargs)
    own = {} if local.is_dir() else {key: kwargs[key] for key in SOURCE if key in kwargs}
    shared = {key: value for key, value in kwargs.items() if not own or key not in PLACE}
    base = adapter_base(name_or_path, **own)
    loaded = load_pretrained(base, model_class=model_class or class_of_base(settings), **shared)
    if kwargs.get("output_loading_info"):
        model, information = loaded
        return load_adapter(model, name_or_path, **own), information
    return load_adapter(loaded, name_or_path, **own)


def _load_beside(directory: Path, model_class: Any, kwargs: dict[str, Any]) -> Any:
    """Load a model whose adapter lies in the same directory, which transformers loads with it."""
    record = read_adapter_record(directory)
    with mark_read():
        loaded = _load(directory, model_class, kwargs)
    if record is not None:
        record.pop(BASE_WEIGHTS, None)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        with applied(model, record, directory):
            pass
    return loaded


def _record_of_model(name_or_path: str | Path, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record in the config beside some weights; None if there is no config."""
    try:
        return SavedConfig.read(name_or_path, **kwargs).record
    except RopeError:
        return None


def _find_record(source: str | Path | Config | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record that a directory or a config holds."""
    if isinstance(source, Mapping):
        return SavedConfig.from_settings({**source}, "the config").record
    if not isinstance(source, str | Path):
        return revert_config(source)[1]
    if read_adapter_config(source) is not None:
        return read_adapter_record(source)
    return SavedConfig.read(source).record


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the config"
