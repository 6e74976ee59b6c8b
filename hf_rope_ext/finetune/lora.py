"""Choose the weights that a long-context fine-tune trains, and add their PEFT adapter."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_rope_ext.checks import require_choice, require_integer
from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.find import find_rotaries
from hf_rope_ext.rotary.installed import patch_of

ADAPTERS = ("lora", "rslora", "dora", "full")
"""Ways to train: LoRA, two variants of it, or every weight of the text model.

rsLoRA divides by the square root of the rank (Kalajdzievski, 2023, arXiv:2312.03732); DoRA trains
magnitudes separately from directions (Liu et al., 2024, arXiv:2402.09353).
"""

TARGETS = ("attention", "all-linear")


def find_text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return path and module of the text model, which owns the rotary embedding.

    Raises:
        RopeError: If there is no rotary embedding or no text model.
    """
    patch = patch_of(model)
    config = patch.sites[0].config if patch else find_rotaries(model)[0].config
    owners = [
        (path, module)
        for path, module in model.named_modules()
        if getattr(module, "config", None) is config
    ]
    embedding = [owner for owner in owners if hasattr(owner[1], "embed_tokens")]
    stacks = [owner for owner in owners if any(True for _ in _blocks(owner[1]))]
    if not embedding + stacks:
        raise RopeError(f"{type(model).__name__} has no stack of decoder layers.")
    return (embedding + stacks)[0]


def find_target_modules(model: nn.Module, targets: str = "attention") -> list[str]:
    """Return the full paths of the text model's linear layers that get an adapter.

    Args:
        model: A transformers model; layers of a vision tower are never targets.
        targets: ``"attention"``, the projections into and out of attention, as in LongLoRA (Chen
            et al., 2023, arXiv:2309.12307, sec. 3.3); or ``"all-linear"``, every linear layer of
            the decoder's blocks.

    Raises:
        RopeError: If there are none, or ``targets`` is unknown.
    """
    require_choice("targets", targets, TARGETS)
    prefix, text = find_text_model(model)
    paths = [
        _join(prefix, block, name)
        for block, layer in _blocks(text)
        for name, module in layer.named_modules()
        if _is_linear(module) and (targets == "all-linear" or _in_attention(layer, name))
    ]
    if not paths:
        raise RopeError(
            f"{type(text).__name__} has no {targets} layer that is an nn.Linear; name the modules "
            f"in lora_targets."
        )
    return paths


def find_norms_and_embeddings(model: nn.Module) -> list[str]:
    """Return the full paths of the modules that LongLoRA trains besides the adapters.

    These are the input embedding and the norms of the hidden state (LongLoRA, arXiv:2309.12307,
    sec. 3.3), without the norms inside attention (``q_norm``, ``k_norm``), which the short names
    in published recipes also match.
    """
    prefix, text = find_text_model(model)
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
    norms_and_embeddings: bool = False,
) -> nn.Module:
    """Return the model with an adapter to train and all other weights frozen.

    Args:
        model: A transformers model, patched or not.
        adapter: One of `ADAPTERS`.
        rank: Rank of the low-rank updates.
        alpha: The updates are scaled by ``alpha / rank``.
        dropout: Dropout on the adapter's input.
        targets: As for `find_target_modules`, or module names as in PEFT.
        norms_and_embeddings: Whether norms and the input embedding are also trained, in full.

    Returns:
        A PEFT model, or ``model`` itself for ``"full"``.

    Raises:
        RopeError: If a value is out of range, the model does not predict tokens, or PEFT would
            train no or other modules.
    """
    require_choice("adapter", adapter, ADAPTERS)
    if adapter == "full":
        _freeze_all_but_text(model)
        return model
    require_integer("lora_rank", rank, 1)
    if not hasattr(model, "prepare_inputs_for_generation"):  # which PEFT takes over
        raise RopeError(
            f"{type(model).__name__} has no head that predicts the next token, which adapters are "
            f"trained by; load the model with one, such as AutoModelForCausalLM."
        )
    from peft import LoraConfig, get_peft_model

    if isinstance(targets, str):
        targets = _shorten(model, find_target_modules(model, targets))
    saved = find_norms_and_embeddings(model) if norms_and_embeddings else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=saved,
        use_rslora=adapter == "rslora",
        use_dora=adapter == "dora",
        # otherwise a tied head silently keeps the untrained embedding
        ensure_weight_tying=saved is not None and _is_tied(model),
        task_type="CAUSAL_LM",
    )
    try:
        wrapped: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise RopeError(f"PEFT cannot adapt {targets[:4]}: {error}") from error
    if saved is not None:
        _require_only(wrapped, set(saved))
    return wrapped


def _is_tied(model: Any) -> bool:
    head = getattr(model.get_output_embeddings(), "weight", None)
    return head is model.get_input_embeddings().weight


def _require_only(wrapped: nn.Module, saved: set[str]) -> None:
    """Check that PEFT, which matches by suffix, took exactly these modules, and a tied head."""
    from peft.utils import ModulesToSaveWrapper

    base = wrapped.get_base_model()  # type: ignore[operator]
    taken = {
        path
        for path, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and module is not base.get_output_embeddings()
    }
    if taken != saved:
        raise RopeError(
            f"PEFT would not train exactly the norms and embeddings of this family, but differ in "
            f"{sorted(taken ^ saved)}; train it without train_norms_and_embeddings."
        )


def _freeze_all_but_text(model: nn.Module) -> None:
    model.requires_grad_(False)
    find_text_model(model)[1].requires_grad_(True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        head.requires_grad_(True)


def _shorten(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the last parts of the paths if they match no other module, else the paths."""
    last = {path.rpartition(".")[2] for path in paths}
    matched = {path for path, module in model.named_modules() if path.rpartition(".")[2] in last}
    return sorted(last) if matched == set(paths) else paths


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the decoder's blocks: the members of the first module list that has attention."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and any(map(_is_attention, child.modules())):
            for index, block in child.named_children():
                yield f"{name}.{index}", block
            return


def _in_attention(root: nn.Module, path: str) -> bool:
    parts = path.split(".")
    inside = [root.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return any(map(_is_attention, inside))


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    # a whole layer can be named after its attention, and latent attention after its letters
    return ("Attention" in name or "MLA" in name) and "Layer" not in name


def _is_linear(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
