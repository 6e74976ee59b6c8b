"""Identify the model, tokenizer and processor that numbers belong to."""

import hashlib
import json
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.rotary.installed import patch_of

BOOKKEEPING = ("_name_or_path", "transformers_version")
"""Config entries that differ between copies of the same model."""

SAMPLED = 4096
"""Elements of each tensor that the digest of the weights covers at the start, and again overall."""


def model_settings(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the identity of a model: architecture, weights, scaling and patches in force."""
    config: Any = model.config
    text = config.get_text_config()
    return {
        "name": name,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights_sha256": weights_digest(model),
        "config_sha256": _digest(_without_bookkeeping(config.to_dict())),
        "trained_length": trained_length(model),
        "rope_parameters": getattr(text, "rope_parameters", None),
        "patches": {target: patch_record(model, target) for target in ("text", "vision")},
    }


def trained_length(model: nn.Module) -> int:
    """Return the trained length of a model, patched or not, in positions."""
    patch = patch_of(model)
    sites = read_sites(model) if patch is None else patch.sites
    return sites[0].geometry.original_max_position_embeddings


def patch_record(model: nn.Module, target: str = "text") -> dict[str, Any] | None:
    """Return the record of a patch in force, None without one.

    It holds the method, temperature, layout, visual positions and request policy.
    """
    patch = patch_of(model, target)
    return None if patch is None else dict(patch.record)


def weights_digest(model: nn.Module) -> str:
    """Return a hash of samples of the weights that differs between models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        spread = flat[:: max(len(flat) // SAMPLED, 1)]
        sample = torch.cat((flat[:SAMPLED], spread)).to("cpu").contiguous()
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        # left over from the last call, not a property of the tokenizer
        rules = {
            name: rule for name, rule in rules.items() if name not in ("padding", "truncation")
        }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([rules, special, getattr(tokenizer, "chat_template", None)])


def processor_digest(processor: Any) -> str | None:
    """Return a hash of a processor's settings, None without one."""
    if processor is None:
        return None
    parts = [getattr(processor, f"{kind}_processor", None) for kind in ("image", "video")]
    settings = [None if part is None else _without_bookkeeping(part.to_dict()) for part in parts]
    template = getattr(processor, "chat_template", None)
    tokenizer = getattr(processor, "tokenizer", None)
    words = None if tokenizer is None else tokenizer_digest(tokenizer)
    return _digest([type(processor).__name__, settings, template, words])


def text_digest(text: str) -> str:
    """Return a hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def environment(model: nn.Module) -> dict[str, str]:
    """Return versions and the kind of device."""
    return {
        "hf_rope_ext": version("hf-rope-ext"),
        "transformers": version("transformers"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": next(model.parameters()).device.type,
    }


def _without_bookkeeping(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: _without_bookkeeping(part) for name, part in value.items() if name not in BOOKKEEPING
    }


def _digest(value: Any) -> str:
    # other objects enter by their type: their text may hold a memory address
    text = json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    return text_digest(text)
