"""Sort the arguments that lm-eval passes to a model."""

import inspect
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from hf_rope_ext.errors import RopeError
from hf_rope_ext.methods import knobs, split_name
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.saving.adapters import adapter_base

PATCH_ARGUMENTS = frozenset(inspect.signature(patch_model).parameters) - {"model", "method_knobs"}


def split(method: str | None, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those of `patch_model` and the rest.

    Raises:
        RopeError: If there are arguments of `patch_model` but no method.
    """
    patch_names = set(PATCH_ARGUMENTS)
    if method is not None:
        patch_names.update(name for cls in split_name(method) for name in knobs(cls))
    patch = {name: value for name, value in arguments.items() if name in patch_names}
    rest = {name: value for name, value in arguments.items() if name not in patch_names}
    if method is None:
        if patch:
            raise RopeError(f"{', '.join(patch)} given without a method.")
        return {}, rest
    return {"method": method, **patch}, rest


def require_effect(arguments: dict[str, Any]) -> None:
    """Check that HFLM applies all arguments to a model in memory.

    Raises:
        RopeError: If one would be ignored.
    """
    known = set(inspect.signature(HFLM.__init__).parameters) - {"peft", "delta", "parallelize"}
    idle = sorted(set(arguments) - known)
    if idle:
        raise RopeError(f"a model in memory takes no {', '.join(idle)}; use them to load it.")


def base_of(adapter: str, arguments: dict[str, Any]) -> str:
    """Return the base model of an adapter, and add the adapter to the arguments."""
    if arguments.setdefault("peft", adapter) != adapter:
        raise RopeError(f"{adapter!r} is an adapter itself; it takes no peft.")
    if (Path(adapter) / "tokenizer_config.json").is_file():
        arguments.setdefault("tokenizer", adapter)
    return adapter_base(adapter)
