"""Read the config of a saved model as it was before any recorded patch, and the record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host
from hf_rope_ext.models.family import Config
from hf_rope_ext.models.rope_config import RECORD, STOP
from hf_rope_ext.patching.adapter_record import merge_records
from hf_rope_ext.saving.adapters import SOURCE
from hf_rope_ext.saving.record import require_known

ROPE = ("rope_scaling", "rope_parameters")
"""Config keys of the scaling, the older first."""
INNER = ("thinker_config", "text_config")
"""Config keys of a text config."""
CODE = (*SOURCE, "trust_remote_code", "code_revision")
"""Arguments of ``from_pretrained`` that select a config's code."""


@dataclass(frozen=True)
class SavedConfig:
    """The config of a saved model.

    Args:
        settings: Its entries as before any recorded patch, in their current form.
        record: The record of the patch, if any.
        as_found: Whether the settings are as they were saved.
    """

    settings: dict[str, Any]
    record: dict[str, Any] | None
    as_found: bool

    @classmethod
    def read(cls, name_or_path: str | Path, **kwargs: Any) -> "SavedConfig":
        """Read the config of a model.

        Raises:
            RopeError: If there is no readable config.
        """
        from transformers import PreTrainedConfig

        source = {key: kwargs[key] for key in (*SOURCE, "gguf_file") if key in kwargs}
        if isinstance(name_or_path, Path) and not name_or_path.exists():
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
        return cls.from_settings(settings, name_or_path)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], source: Any) -> "SavedConfig":
        """Revert and modernize the entries of a config.

        Raises:
            RopeError: If they hold an unknown record.
        """
        records: list[dict[str, Any]] = []
        _restore(settings, records)
        for record in records:
            require_known(record, source)
        older = _modernize(settings)
        return cls(settings, merge_records(records), not (records or older))

    def config_class(self, name_or_path: str | Path | None, **kwargs: Any) -> Any:
        """Return the class of the config, from remote code where that is trusted.

        Raises:
            RopeError: If there is none.
        """
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        known = self.settings["model_type"] in CONFIG_MAPPING
        remote = "AutoConfig" in (self.settings.get("auto_map") or {})
        if known and not (remote and kwargs.get("trust_remote_code")):
            return CONFIG_MAPPING[self.settings["model_type"]]
        code = {key: kwargs[key] for key in CODE if key in kwargs}
        try:
            return type(AutoConfig.from_pretrained(name_or_path, **code))
        except (OSError, ValueError) as error:
            raise RopeError(f"cannot build the config of {str(name_or_path)!r}: {error}") from error


def read_config(name_or_path: str | Path, **kwargs: Any) -> tuple[Config, dict[str, Any] | None]:
    """Return a model's config as before any recorded patch, and the record.

    Raises:
        RopeError: If there is no readable config.
    """
    from transformers import AutoConfig

    saved = SavedConfig.read(name_or_path, **kwargs)
    try:
        if saved.as_found:
            return AutoConfig.from_pretrained(name_or_path, **kwargs), None
        return saved.config_class(name_or_path, **kwargs).from_dict(saved.settings), saved.record
    except RopeError:
        raise
    except Exception as error:  # transformers' validators raise various types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RopeError(f"the config of {str(name_or_path)!r} is not valid: {reason}") from error


def revert_config(config: Config) -> tuple[Config, dict[str, Any] | None]:
    """Return a config in memory as before any patch that it records, and the record."""
    saved = SavedConfig.from_settings(config.to_dict(), config)
    if saved.as_found:
        return config, None
    reverted = type(config).from_dict(saved.settings)
    host.set_attention_name(reverted, host.attention_name(config))
    return reverted, saved.record


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
