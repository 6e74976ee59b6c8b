"""Read the settings of our tasks from lm-eval's metadata, which includes model arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rope_ext.checks import suggest
from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.lm_eval.arguments import PATCH_ARGUMENTS
from hf_rope_ext.evals.registry import require_known
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.parsing import parse_lengths
from hf_rope_ext.saving.adapters import adapter_base
from hf_rope_ext.saving.loading import read_config, skeleton

LENGTHS = ("1x", "2x", "4x")
SETTINGS = ("lengths", "samples", "seed", "tokenizer", "trained_length")


@dataclass(frozen=True)
class Settings:
    """How to build documents.

    Args:
        tokenizer: The model's tokenizer.
        lengths: Context lengths in tokens.
        samples: Documents per length and depth.
        seed: Seed for all sampling.
        options: Options of the task.
    """

    tokenizer: Any
    lengths: tuple[int, ...]
    samples: int
    seed: int
    options: dict[str, Any]

    def record(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return metadata for the results file, including the settings in use."""
        name = getattr(self.tokenizer, "name_or_path", None)
        settings = {"lengths": list(self.lengths), "samples": self.samples, "seed": self.seed}
        return {**metadata, **settings, "tokenizer": name}


def for_task(metadata: Mapping[str, Any], task: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of one task: settings under its name override those for all tasks.

    Raises:
        RopeError: If there are settings for an unknown task.
    """
    for name, value in metadata.items():
        if name.startswith("rope_") and isinstance(value, Mapping):
            require_known(name, known)
    common = {name: value for name, value in metadata.items() if name not in known}
    return {**common, **metadata.get(task, {})}


def read_settings(metadata: Mapping[str, Any], options: Sequence[str]) -> Settings:
    """Return the settings of a task.

    Args:
        metadata: lm-eval's metadata: the YAML file, ``--metadata`` and ``--model_args`` combined.
        options: Names of the task's options.

    Raises:
        RopeError: If a setting is missing, invalid or misspelled, or a length exceeds the model's.
    """
    _require_spelling(metadata, [*SETTINGS, *options])
    lengths = _lengths(metadata)
    _require_reach(metadata, max(lengths))
    return Settings(
        tokenizer=_tokenizer(metadata),
        lengths=lengths,
        samples=metadata.get("samples", 10),
        seed=metadata.get("seed", 42),
        options={
            name: metadata[name]
            for name in options
            if name in metadata and not _is_patch_argument(name, metadata[name])
        },
    )


def trained_length(metadata: Mapping[str, Any]) -> int:
    """Return the trained length of the model that the metadata names.

    Raises:
        RopeError: If it names none.
    """
    trained = metadata.get("trained_length")
    if trained is None and isinstance(metadata.get("pretrained"), str):
        config, _ = read_config(_base(metadata["pretrained"]))
        trained = read_sites(
            skeleton(config),
            original_max_position_embeddings=metadata.get("original_max_position_embeddings"),
        )[0].geometry.original_max_position_embeddings
    if trained is None:
        raise RopeError(
            "the model's trained length is not known; give it: --metadata trained_length=4096."
        )
    return int(trained)


def _is_patch_argument(name: str, value: Any) -> bool:
    """Return whether a setting belongs to `patch_model`, such as ``temperature="logits"``."""
    return name in PATCH_ARGUMENTS and isinstance(value, str)


def _require_spelling(metadata: Mapping[str, Any], known: Sequence[str]) -> None:
    """Reject near misses of known names; other names may be arguments of the model."""
    for name in metadata:
        if name not in known and name not in PATCH_ARGUMENTS:
            hint = suggest(name, known, cutoff=0.8)
            if hint:
                raise RopeError(f"metadata: unknown {name!r}.{hint}")


def _lengths(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    value = metadata.get("lengths", LENGTHS)
    lengths = [str(length) for length in (value if isinstance(value, list | tuple) else [value])]
    relative = any("x" in length.lower() for length in lengths)
    trained = trained_length(metadata) if relative else 1
    return tuple(sorted({n for length in lengths for n in parse_lengths(length, trained)}))


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained")
    if tokenizer is None:
        raise RopeError(
            "the tasks need the model's tokenizer: for a model in memory use "
            "hf_rope_ext.evals.lm_eval.tasks.task_manager(lm), else --metadata tokenizer=DIRECTORY."
        )
    if not isinstance(tokenizer, str):
        return tokenizer
    if not metadata.get("tokenizer") and not (Path(tokenizer) / "tokenizer_config.json").is_file():
        tokenizer = _base(tokenizer)
    settings = {"add_bos_token": metadata["add_bos_token"]} if "add_bos_token" in metadata else {}
    trusted = bool(metadata.get("trust_remote_code", False))
    return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trusted, **settings)


def _base(name: str) -> str:
    """Return the base model of an adapter, or the model itself."""
    if not (Path(name) / "adapter_config.json").is_file():
        return name
    return adapter_base(name)


def _require_reach(metadata: Mapping[str, Any], longest: int) -> None:
    """Check the length of an unpatched model, since other models truncate prompts silently."""
    from transformers import PreTrainedConfig

    name = metadata.get("pretrained")
    if metadata.get("method") or not isinstance(name, str) or _base(name) != name:
        return
    config, _ = PreTrainedConfig.get_config_dict(name)
    saved = config.get("text_config") or config
    reach = (
        metadata.get("max_length")
        or metadata.get("max_model_len")
        or saved.get("max_position_embeddings")
    )
    if reach is not None and longest > int(reach):
        raise RopeError(
            f"a length of {longest} was requested, but the model's is {reach}. Extend it "
            f"(--model_args method=yarn,factor=4), or request shorter lengths."
        )
