"""Merge an adapter into its base model, for tools without this package or PEFT."""

from pathlib import Path
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.engines import export
from hf_rope_ext.saving.loading import load_pretrained


def merge_adapter(
    adapter: str | Path, output: str | Path, *, frozen: int | None = None, **kwargs: Any
) -> None:
    """Write the base model with the adapter merged and its RoPE in the plain config.

    ``AutoModelForCausalLM.from_pretrained(output)`` then computes the same logits, without this
    package or PEFT.

    Args:
        adapter: Directory of an adapter that was trained on a patched model.
        output: A new or empty directory to write to.
        frozen: For length-dependent methods: the length, in positions, whose plan the merged model
            uses at every length.
        **kwargs: Passed to ``from_pretrained`` of the base model, such as ``dtype``.

    Raises:
        RopeError: If ``adapter`` holds no adapter, ``output`` is not empty, or a stock config
            cannot express the method. Nothing is written then.
    """
    adapter, output = Path(adapter), Path(output)
    if not (adapter / "adapter_config.json").is_file():
        raise RopeError(f"{str(adapter)!r} holds no adapter.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RopeError(f"{str(output)!r} already exists; give a new directory.")
    model: Any = load_pretrained(adapter, **kwargs)
    patch = patch_of(model)
    if patch is not None and frozen is not None:
        geometry = patch.sites[0].geometry
        method = patch.method.freeze(geometry, frozen)
        patch_model(
            model,
            method,
            original_max_position_embeddings=geometry.original_max_position_embeddings,
            temperature=patch.temperature,
            replace=True,
        )
    if patch is not None:
        export(model)  # raises if stock tools could not read the config
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    _copy_tokenizer(adapter, model, output)


def _copy_tokenizer(adapter: Path, model: Any, output: Path) -> None:
    from transformers import AutoTokenizer

    for source in (adapter, model.peft_config["default"].base_model_name_or_path):
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(output)
        except (OSError, ValueError):
            continue
        return
