"""Which weights a long-context fine-tune trains, and the PEFT model around them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.find import find_rotaries
from hf_rope_ext.rotary.installed import patch_of

ADAPTERS = ("lora", "rslora", "dora", "full")
"""What can be trained: low-rank updates, two variants of them, or every weight of the text model.

rsLoRA divides by the square root of the rank (Kalajdzievski, 2023, arXiv:2312.03732); DoRA trains
magnitudes beside directions (Liu et al., 2024, arXiv:2402.09353).
"""

TARGETS = ("attention", "all-linear")


def text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the path and the module of the text model: the one that owns the rotary embedding.

    Raises:
        RopeError: If there is no rotary embedding, or several text models.
    """
    patch = patch_of(model)
    config = patch.resolved.sites[0].config if patch else find_rotaries(model)[0].config
    found = [
        (path, module)
        for path, module in model.named_modules()
        if getattr(module, "config", None) is config and hasattr(module, "embed_tokens")
    ]
    if not found:
        owners = [
            (path, module)
            for path, module in model.named_modules()
            if getattr(module, "config", None) is config and any(True for _ in _blocks(module))
        ]
        found = owners[-1:]
    if not found:
        raise RopeError(f"{type(model).__name__} holds no stack of decoder layers.")
    return found[0]


def target_modules(model: nn.Module, targets: str = "attention") -> list[str]:
    """Return full paths of the linear layers of the text model that get an adapter.

    Args:
        model: A transformers model; a vision tower's layers are never targets.
        targets: ``"attention"``, the projections into and out of attention, as in LongLoRA (Chen
            et al., 2023, arXiv:2309.12307, sec. 3.3); or ``"all-linear"``, every linear layer of
            the decoder's blocks.

    Raises:
        RopeError: If there are none, or no such choice.
    """
    if targets not in TARGETS:
        raise RopeError(f"targets must be one of {', '.join(TARGETS)}, got {targets!r}.")
    prefix, text = text_model(model)
    paths = [
        _join(prefix, block, name)
        for block, layer in _blocks(text)
        for name, module in layer.named_modules()
        if _linear(module) and (targets == "all-linear" or _in_attention(layer, name))
    ]
    if not paths:
        raise RopeError(
            f"no {targets} layer of {type(text).__name__} is an nn.Linear; name the modules with "
            f"lora_targets."
        )
    return paths


def norms_and_embeddings(model: nn.Module) -> list[str]:
    """Return full paths of the weights that LongLoRA trains beside the adapters.

    These are the input embedding and the norms of the hidden state (LongLoRA, arXiv:2309.12307,
    sec. 3.3). Norms inside attention (``q_norm``, ``k_norm``) are not among them, although the
    names that recipes give match them.
    """
    prefix, text = text_model(model)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    paths = [path for path, module in model.named_modules() if module is embedding]
    for name, module in text.named_modules():
        if "norm" in type(module).__name__.lower() and not _in_attention(text, name):
            paths.append(_join(prefix, name))
    return paths


def add_adapter(
    model: nn.Module,
    adapter: str = "lora",
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | list[str] = "attention",
    norms_and_embeddings_too: bool = False,
) -> nn.Module:
    """Return the model with the wanted weights trainable and all others frozen.

    Args:
        model: A transformers model, patched or not.
        adapter: One of `ADAPTERS`.
        rank: Of the low-rank updates.
        alpha: Their scale, times the rank.
        dropout: On their input.
        targets: What `target_modules` takes, or names of modules as in PEFT.
        norms_and_embeddings_too: Whether norms and the input embedding are trained in full.

    Returns:
        A PEFT model, or ``model`` itself for ``"full"``.

    Raises:
        RopeError: If a value is out of range, or no or other modules than meant would be trained.
    """
    if adapter not in ADAPTERS:
        raise RopeError(f"adapter must be one of {', '.join(ADAPTERS)}, got {adapter!r}.")
    if adapter == "full":
        _freeze_all_but_text(model)
        return model
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RopeError(f"lora_rank must be an integer of at least 1, got {rank!r}.")
    from peft import LoraConfig, get_peft_model

    named = targets if isinstance(targets, list) else target_modules(model, targets)
    saved = norms_and_embeddings(model) if norms_and_embeddings_too else None
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=named if isinstance(targets, list) else _short(model, named),
        modules_to_save=saved,
        use_rslora=adapter == "rslora",
        use_dora=adapter == "dora",
        # without it a tied head silently keeps the untrained embedding
        ensure_weight_tying=bool(saved) and tied,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise RopeError(f"PEFT cannot adapt {named[:4]}: {error}") from error
    if saved is not None:
        _require_only(wrapped, set(saved), tied)
    return wrapped


def _require_only(wrapped: nn.Module, saved: set[str], tied: bool) -> None:
    """Check that PEFT, which matches by suffix, took exactly the modules meant."""
    from peft.utils import ModulesToSaveWrapper

    base = wrapped.get_base_model()  # type: ignore[operator]
    taken = {
        path for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }
    head = {path for path in taken - saved if tied and "embed" not in path} if tied else set()
    if taken - head != saved:
        raise RopeError(
            f"PEFT would train {sorted(taken ^ saved)} differently from what was meant; this is a "
            f"family whose module names need lora_targets and modules of their own."
        )


def _freeze_all_but_text(model: nn.Module) -> None:
    model.requires_grad_(False)
    text_model(model)[1].requires_grad_(True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        head.requires_grad_(True)


def _short(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the last parts of the names where they mean the same modules, else the paths."""
    last = {path.rsplit(".", 1)[-1] for path in paths}
    matched = {path for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in last}
    return sorted(last) if matched == set(paths) else paths


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the decoder's blocks: the members of the first list of modules that holds attention."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and any(
            "attention" in type(part).__name__.lower() for part in child.modules()
        ):
            for index, block in child.named_children():
                yield f"{name}.{index}", block
            return


def _in_attention(root: nn.Module, path: str) -> bool:
    parts = path.split(".")
    inside = [root.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return any("attention" in type(module).__name__.lower() for module in inside)


def _linear(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
