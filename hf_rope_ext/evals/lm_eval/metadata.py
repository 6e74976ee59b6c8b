"""What lm-eval's metadata says to our tasks: its own, and the arguments of the model."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.evals.lm_eval.arguments import PATCH_ARGUMENTS
from hf_rope_ext.evals.tasks import require_known
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.parsing import parse_lengths
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.loading import read_config, skeleton

LENGTHS = "1x,2x,4x"
OWN = ("lengths", "samples", "seed", "tokenizer", "trained_length")


@dataclass(frozen=True)
class Settings:
    """How documents are built.

    Args:
        tokenizer: Of the model that is asked.
        lengths: In tokens.
        samples: Documents per length and depth.
        seed: Of everything drawn.
        options: The task's own.
    """

    tokenizer: Any
    lengths: tuple[int, ...]
    samples: int
    seed: int
    options: dict[str, Any]

    def recorded(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return metadata for the results: what was used, in plain data."""
        name = getattr(self.tokenizer, "name_or_path", None)
        used = {"lengths": list(self.lengths), "samples": self.samples, "seed": self.seed}
        return {**metadata, **used, "tokenizer": name}


def for_task(metadata: Mapping[str, Any], task: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of one task: settings under its name go before those for all.

    Raises:
        RopeError: If there are settings for a task that is not known.
    """
    for name, value in metadata.items():
        if name.startswith("rope_") and isinstance(value, Mapping):
            require_known(name, known)
    common = {name: value for name, value in metadata.items() if name not in known}
    return {**common, **metadata.get(task, {})}


def read_settings(metadata: Mapping[str, Any], options: Sequence[str]) -> Settings:
    """Return the settings of a task.

    Args:
        metadata: lm-eval's: of the YAML file, ``--metadata`` and ``--model_args`` in one.
        options: Names of the task's options.

    Raises:
        RopeError: If a setting is missing, wrong or misspelt, or a length is beyond the model's.
    """
    _require_spelling(metadata, [*OWN, *options])
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
            if name in metadata and not _is_the_patchs(name, metadata[name])
        },
    )


def trained_length_of(model: nn.Module) -> int | None:
    """Return the trained length of a model, None where its config has none."""
    patch = patch_of(model)
    sites = read_sites(model) if patch is None else patch.sites
    return sites[0].geometry.original_max_position_embeddings


def trained_length(metadata: Mapping[str, Any]) -> int:
    """Return the trained length of the model that metadata speak of.

    Raises:
        RopeError: If they do not say which.
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
            "the model's trained length is not known; say it: --metadata trained_length=4096."
        )
    return int(trained)


def _is_the_patchs(name: str, value: Any) -> bool:
    """Return whether a setting is an argument of `patch_model`: the temperature in words."""
    return name in PATCH_ARGUMENTS and isinstance(value, str)


def _require_spelling(metadata: Mapping[str, Any], known: Sequence[str]) -> None:
    """Check names as well as can be: arguments of any model are among them."""
    for name in metadata:
        if name not in known and name not in PATCH_ARGUMENTS:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if near:
                raise RopeError(f"metadata: unknown {name!r}. Did you mean {near[0]!r}?")


def _lengths(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    given = metadata.get("lengths", LENGTHS)
    text = given if isinstance(given, str) else ",".join(map(str, _listed(given)))
    trained = trained_length(metadata) if "x" in text.lower() else 1
    return parse_lengths(text, trained)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    found = metadata.get("tokenizer") or metadata.get("pretrained")
    if found is None:
        raise RopeError(
            "the tasks need the model's tokenizer: for a model in memory use "
            "hf_rope_ext.evals.lm_eval.tasks.task_manager(lm), else --metadata tokenizer=DIRECTORY."
        )
    if not isinstance(found, str):
        return found
    if not metadata.get("tokenizer") and not (Path(found) / "tokenizer_config.json").is_file():
        found = _base(found)
    settings = {"add_bos_token": metadata["add_bos_token"]} if "add_bos_token" in metadata else {}
    trusted = bool(metadata.get("trust_remote_code", False))
    return AutoTokenizer.from_pretrained(found, trust_remote_code=trusted, **settings)


def _base(name: str) -> str:
    """Return the base model of an adapter, or the model itself."""
    if not (Path(name) / "adapter_config.json").is_file():
        return name
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(name).base_model_name_or_path)


def _require_reach(metadata: Mapping[str, Any], longest: int) -> None:
    """Check the length of a model that is not patched here: other models cut prompts in silence."""
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
            f"a length of {longest} was asked for, but the model's is {reach}. Patch it to reach "
            f"further (--model_args method=yarn,factor=4), or ask for shorter lengths."
        )
