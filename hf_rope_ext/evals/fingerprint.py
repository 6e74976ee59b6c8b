"""Identify the model, tokenizer and processor that numbers belong to."""

import hashlib
import json
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.models.host import attention_name
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.rotary.installed import patch_of

BOOKKEEPING = (
    "_name_or_path",
    "gradient_checkpointing",
    "hf_device_map",
    "name_or_path",
    "transformers_version",
)
"""Entries of configs and modules that differ between copies of a model which compute the same."""


def model_settings(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the identity of a model: architecture, weights, scaling and patches in force."""
    config: Any = model.config
    text = config.get_text_config()
    return {
        "name": name,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": attention_name(text),
        "weights_sha256": weights_digest(model),
        "modules_sha256": modules_digest(model),
        "config_sha256": _digest(_without_bookkeeping(config.to_dict())),
        "trained_length": trained_length(model),
        "rope_parameters": getattr(text, "rope_parameters", None),
        "patches": {target: patch_record(model, target) for target in ("text", "vision")},
    }


def trained_length(model: nn.Module) -> int:
    """Return the trained length of a model, patched or not, in positions; 0 if it is not known."""
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
    """Return a hash of everything that a model saves: names, shapes, dtypes and all numbers.

    It reads every byte, at the speed of SHA-256: some 10 s for 16 GB on an idle processor.
    """
    digest = hashlib.sha256()
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.is_meta or place not in seen:  # tied weights are read once
            seen[place] = _tensor_digest(_loaded(model, name, tensor))
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {seen[place]}\n".encode())
    return digest.hexdigest()


def modules_digest(model: nn.Module) -> str:
    """Return a hash of what modules are set to beside weights and config.

    These are their buffers that are not saved, and numbers, words and collections of them, such as
    a softmax scale or the adapter in use. Other attributes are objects with a life of their own,
    such as the states of a recurrent layer.
    """
    torchs_own = vars(nn.Module())
    saved = model.state_dict().keys()
    settings = {}
    for path, module in model.named_modules():
        if _follows_requests(module):
            continue
        attributes = {key: part for key, part in vars(module).items() if key not in torchs_own}
        buffers = {
            name: _tensor_digest(buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if f"{path}.{name}".lstrip(".") not in saved
        }
        settings[path] = [type(module).__qualname__, buffers, _plain(attributes)]
    return _digest(_without_bookkeeping(settings))


def _loaded(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor that accelerate keeps elsewhere, such as on a disk, until it is needed."""
    if not tensor.is_meta:
        return tensor
    from accelerate.utils import align_module_device

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module, "cpu"):
        return getattr(module, leaf).detach().clone()  # type: ignore[no-any-return]


def _tensor_digest(tensor: Tensor) -> str:
    """Return a hash of the bytes of a tensor, or of all tensors that it consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = [_tensor_digest(getattr(tensor, name)) for name in names]
        return _digest([parts, str(context)])
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _follows_requests(module: nn.Module) -> bool:
    """Return whether a stock rotary module changes with every request, as its config says."""
    types = getattr(module, "rope_type", None)
    names = types.values() if isinstance(types, dict) else [types]
    return any(name in ("dynamic", "longrope") for name in names)


def _plain(value: Any) -> Any:
    """Return a setting as JSON data, None if it is none; collections lose their other parts."""
    if isinstance(value, dict):
        parts = {str(name): _plain(part) for name, part in value.items()}
        return {name: part for name, part in parts.items() if part is not None} or None
    if isinstance(value, list | tuple | set | frozenset):
        ordered = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [part for part in map(_plain, ordered) if part is not None] or None
    return value if isinstance(value, bool | int | float | str) else None


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
    # the code between rules and text: where generated tokens get their spaces, for one
    code = [
        type(tokenizer).__qualname__,
        *(
            getattr(tokenizer, name, None)
            for name in ("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token")
        ),
    ]
    return _digest([rules, special, getattr(tokenizer, "chat_template", None), code])


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


def versions() -> dict[str, str]:
    """Return the versions of the packages whose code decides the numbers."""
    return {
        "hf_rope_ext": version("hf-rope-ext"),
        "transformers": version("transformers"),
        "torch": version("torch"),
    }


def environment(model: nn.Module) -> dict[str, str]:
    """Return versions and the kind of device."""
    return {
        **versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": next(model.parameters()).device.type,
    }


def _without_bookkeeping(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_bookkeeping(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_bookkeeping(part) for name, part in value.items() if name not in BOOKKEEPING
    }


def _digest(value: Any) -> str:
    # other objects enter by their type: their text may hold a memory address
    text = json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    return text_digest(text)
