"""Build the model of a recipe: load, patch, and make the chosen weights trainable."""

from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.finetune.lora import TARGETS, add_adapter
from hf_rope_ext.finetune.recipe import Recipe
from hf_rope_ext.finetune.shifted import use_shifted_attention
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import LongRope, Method
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.parsing import parse_methods
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.rotary.installed import patch_of
from hf_rope_ext.saving.loading import load_pretrained, read_config


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the tokenizer of the recipe's model.

    Raises:
        RopeError: If there is none.
    """
    from transformers import AutoTokenizer

    if not recipe.model:
        raise RopeError("the recipe has no model; set model.")
    try:
        return AutoTokenizer.from_pretrained(recipe.model)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RopeError(f"cannot load the tokenizer of {recipe.model!r}: {reason}") from error


def load_base(recipe: Recipe) -> nn.Module:
    """Return the recipe's base model, unpatched, with its dtype, attention and quantization.

    Raises:
        RopeError: If it cannot be loaded, was saved patched, or needs bitsandbytes and that is not
            installed.
    """
    config, record = read_config(recipe.model)
    if record is not None:
        raise RopeError(
            f"{recipe.model!r} was saved patched with {record['method']!r}. Fine-tune its base "
            f"model, or merge its adapter first and give the factor that remains."
        )
    options: dict[str, Any] = {"config": config, "dtype": getattr(torch, recipe.dtype)}
    if recipe.attention is not None:
        options["attn_implementation"] = recipe.attention
    if recipe.quantize != "none":
        options["quantization_config"] = _make_quantization_config(recipe)
        options["device_map"] = {"": _choose_device()}
    try:
        model: nn.Module = load_pretrained(recipe.model, **options)
        return model
    except RopeError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise RopeError(f"cannot load {recipe.model!r}: {reason}") from error


def patch(model: nn.Module, recipe: Recipe, factor: float | None = None) -> int:
    """Patch a model with the recipe's method, and its attention for training.

    Args:
        model: Unpatched, or patched for an earlier stage of a schedule.
        recipe: The settings.
        factor: The factor of this stage, if not the recipe's.

    Returns:
        The target length, in positions.

    Raises:
        RopeError: If the model cannot be patched so.
    """
    before = patch_of(model)
    original = recipe.original_max_position_embeddings
    sites = before.sites if before else read_sites(model, original_max_position_embeddings=original)
    geometry = sites[0].geometry
    trained = geometry.original_max_position_embeddings
    factor = factor or recipe.factor
    if recipe.target_length is not None:
        factor = recipe.target_length / trained
    methods = parse_methods(recipe.method, factor)
    if len(methods) != 1:
        raise RopeError(f"a model is trained with one method, got {recipe.method!r}.")
    (method,) = methods.values()
    if recipe.mixed_windows is not None:
        method = spare_short_requests(method, geometry)
    patch_model(
        model,
        method,
        original_max_position_embeddings=recipe.original_max_position_embeddings,
        temperature=recipe.temperature,
        replace=recipe.replace or before is not None,
    )
    if recipe.shifted_groups is not None:  # a part of the patch, so it is due at every stage
        use_shifted_attention(model, recipe.shifted_groups)
    target = recipe.target_length or method.target_length(geometry)
    if target is None and factor is not None:
        target = round(factor * trained)
    return target or recipe.sequence_length or trained


def trained_length(model: nn.Module) -> int:
    """Return the trained length of a model, in positions."""
    patch = patch_of(model)
    sites = patch.sites if patch else read_sites(model)
    return sites[0].geometry.original_max_position_embeddings


def spare_short_requests(method: Method, geometry: RopeGeometry) -> Method:
    """Return a method that does not scale requests within the trained length.

    LongRoPE2 (Shang et al., 2025, arXiv:2502.20082, sec. 3.3) trains short windows with the
    original frequencies and long ones with the scaled. Length-dependent methods already do so; any
    other becomes ``longrope`` with its slowdowns as the long list, which stock tools load. That
    type has one temperature for both lists, which is set to 1.
    """
    if method.length_dependent:
        return method
    slowdown = (geometry.inv_freq() / method.plan(geometry).inv_freq).tolist()
    length = method.target_length(geometry) or geometry.original_max_position_embeddings
    factor = max(length / geometry.original_max_position_embeddings, 1.0)
    return LongRope(factor=factor, long_factor=slowdown, attention_factor=1.0)


def make_trainable(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Return the model with the recipe's adapter and trainable weights."""
    if recipe.quantize != "none":
        from peft import prepare_model_for_kbit_training

        # Trainer enables checkpointing itself
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets: str | list[str] = list(recipe.lora_targets)
    if len(targets) == 1 and targets[0] in TARGETS:
        targets = targets[0]
    return add_adapter(
        model,
        recipe.adapter,
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        targets=targets,
        norms_and_embeddings=recipe.train_norms_and_embeddings,
    )


def _make_quantization_config(recipe: Recipe) -> Any:
    """Return the settings of QLoRA (Dettmers et al., 2023, arXiv:2305.14314)."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise RopeError("quantize needs bitsandbytes: pip install bitsandbytes")
    if recipe.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if recipe.dtype == "float32" else getattr(torch, recipe.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _choose_device() -> str | int:
    import os

    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
