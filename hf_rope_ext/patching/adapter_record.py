"""The record beside a PEFT adapter, written by whoever saves the adapter of a patched model.

An adapter's own files hold neither the RoPE it was trained under nor the weights it belongs to.
So a patch stands in for ``save_pretrained`` of its model and of whatever wraps the model: PEFT,
transformers' own adapters, and thus Trainer and its relatives, which all save through it.
"""

import hashlib
import json
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hf_rope_ext.changes import StandIn
from hf_rope_ext.models.rope_config import RECORD
from hf_rope_ext.patching.arguments import TARGETS
from hf_rope_ext.rotary.installed import patch_of

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's own file in the directory of an adapter."""

ADAPTER_RECORD = "hf_rope_ext.json"
"""File in the directory of an adapter that records the patch it was trained under."""

BASE_WEIGHTS = "base_weights"
"""Key in that file for the fingerprint of the base model's weights."""

MARK = f"{RECORD}: trained under a RoPE patch, so load it with {RECORD}.load_pretrained"
"""Key in PEFT's file. PEFT quotes keys that it does not know in a warning."""


class SavePretrained(StandIn):
    """Stands in for ``save_pretrained``; afterwards the record lies beside every adapter saved.

    Args:
        model: The model or the PEFT model.
    """

    name = "save_pretrained"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.weights: dict[str, Any] | None = None
        self.place = self.change()
        self.patches = 0  # text and vision are patched and undone in any order

    def add(self) -> None:
        """Put it on its model for one more patch."""
        if self.patches == 0:
            self.place.apply()
        self.patches += 1

    def remove(self) -> None:
        """Take it off its model with the last patch."""
        self.patches -= 1
        if self.patches == 0:
            self.place.revert()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save, and write the record."""
        result = self.stock(*args, **kwargs)
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        # a wrapper of another kind saves what is inside it by that one's own method
        directory = arguments.get("save_directory")
        if directory is not None and arguments.get("is_main_process", True):
            chosen = arguments.get("selected_adapters")
            save_record(self.model, directory, self.weights, chosen)
        return result


@dataclass(eq=False)
class RecordAdapters:
    """Stand-ins for ``save_pretrained`` of a model, its parts, and what wraps it while patched.

    Args:
        model: The model.
    """

    model: nn.Module
    saves: list[SavePretrained] = field(default_factory=list, init=False)
    wrappers: list[nn.Module] = field(default_factory=list, init=False)
    applied: bool = field(default=False, init=False)

    def apply(self) -> None:
        """Put the stand-ins in, and wait for wrappers."""
        self.applied = True
        around = [one for one in self.wrappers if self._is_in(one)]
        for part in (*self.model.modules(), *around):
            self._stand_in(part)
        self._wait()

    def revert(self) -> None:
        """Take every stand-in out, those of wrappers included."""
        self.applied = False
        WAITING.discard(self)
        while self.saves:
            self.saves.pop().remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which waits for wrappers of its own model."""
        self.__dict__.update(state)
        if self.applied:
            self._wait()

    def wrapped(self, parent: nn.Module, module: nn.Module) -> None:
        """Have ``parent`` record the patch too if the model is in ``module``, a part of it."""
        if self._is_in(module) and not any(parent is known for known in self.wrappers):
            self.wrappers.append(parent)
            self._stand_in(parent)

    def _is_in(self, module: nn.Module) -> bool:
        return any(part is self.model for part in module.modules())

    def _stand_in(self, part: nn.Module) -> None:
        if hasattr(type(part), SavePretrained.name):
            found = vars(part).get(SavePretrained.name)
            save = found if isinstance(found, SavePretrained) else SavePretrained(part)
            save.add()
            self.saves.append(save)

    def _wait(self) -> None:
        WAITING.add(self)
        _listen()


WAITING: "weakref.WeakSet[RecordAdapters]" = weakref.WeakSet()
"""The patches in force that wait for wrappers; weakly, so that patched models can be collected."""


@cache
def _listen() -> None:
    """Have torch tell about every module that becomes a part of another one.

    Once and for good: a table of hooks that changed with each patch could do so while torch builds
    a model elsewhere.
    """
    register_module_module_registration_hook(_tell)


def _tell(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Tell the patches inside ``module`` what wraps them."""
    if module is not None and hasattr(type(parent), SavePretrained.name):
        for change in list(WAITING):
            change.wrapped(parent, module)


def unrecorded(model: nn.Module) -> list[str]:
    """Return a warning if a PEFT model is already around a model, where it cannot be seen from."""
    inside = "peft_config" in vars(model) and not getattr(model, "_hf_peft_config_loaded", False)
    return [
        f"{type(model).__name__} is the base of a PEFT model, which will save its adapters without "
        f"a record of this patch; patch the PEFT model instead."
    ] * inside


def live_record(model: nn.Module) -> dict[str, Any] | None:
    """Return the record of a patched model as it would be read from JSON; None if unpatched."""
    patches = [patch for target in TARGETS if (patch := patch_of(model, target))]
    merged = merge_records([patch.record for patch in patches])
    return json.loads(json.dumps(merged)) if merged else None


def merge_records(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Combine the records of a model's text and vision into one; None if there is none."""
    text = [record for record in records if record.get("target") != "vision"]
    vision = [record for record in records if record.get("target") == "vision"]
    if text and vision:
        return {**text[0], "vision": vision[0]}
    return next(iter([*text, *vision]), None)


def save_record(
    model: nn.Module,
    directory: str | Path,
    weights: dict[str, Any] | None = None,
    adapters: Sequence[str] | None = None,
) -> None:
    """Write the record of a patch next to saved PEFT adapters.

    Does nothing if the model is unpatched or no adapter was saved.

    Args:
        model: The PEFT model.
        directory: Where it was saved.
        weights: The `weights_record` of the base model, if it can no longer be computed.
        adapters: Names of the adapters that were saved; all by default.
    """
    record = live_record(model)
    folders = [
        folder for folder in _folders(model, Path(directory), adapters) if _is_adapter(folder)
    ]
    if record is None or not folders:
        return
    record[BASE_WEIGHTS] = weights or weights_record(model)
    for folder in folders:
        _write(folder / ADAPTER_RECORD, record)
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        _write(folder / ADAPTER_CONFIG, {**settings, MARK: True})


def remember_weights(model: nn.Module) -> None:
    """Compute the fingerprint of a base model for all later saves, before it can be sharded."""
    save = vars(model).get(SavePretrained.name)
    if isinstance(save, SavePretrained) and getattr(model, "peft_config", None):
        save.weights = weights_record(model)


def weights_record(model: nn.Module) -> dict[str, Any] | None:
    """Return a fingerprint of a base model's weights that tells it from any other model.

    Adapters are ignored, whatever their type. Quantized, sharded or unloaded weights have none,
    since they cannot be compared with the originals.

    Returns:
        The dtype, and the hash of every weight in full, sorted; or None.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    weights = _base_weights(model)
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()) or any(
        weight.is_meta
        or isinstance(weight, DTensor)
        or not (weight.is_floating_point() and weight.numel())
        for weight in weights
    ):
        return None
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights}
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to other threads
        hashes = sorted(pool.map(_hash, weights))
    return {"dtype": ",".join(sorted(dtypes)), "hashes": hashes}


def _hash(weight: torch.Tensor) -> str:
    numbers = weight.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tuple(weight.shape)}".encode())
    digest.update(memoryview(numbers))  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def _base_weights(model: Any) -> list[torch.Tensor]:
    """Return the weights that a base model had before any adapter, and still has."""
    if not getattr(model, "peft_config", None):
        return list(model.parameters())
    from peft import get_peft_model_state_dict

    rewrites = any(_rewrites_base(config) for config in model.peft_config.values())
    # some types train weights of the base itself, such as LoRA its biases
    trained = {
        weight.untyped_storage().data_ptr()
        for name in model.peft_config
        for weight in get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        ).values()
    }
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {id(weight): weight for weight in _parameters(whole, rewrites)}
    return [weight for weight in own.values() if weight.untyped_storage().data_ptr() not in trained]


def _parameters(module: Any, rewrites: bool) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module's own, without those that PEFT put around or into it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        if isinstance(module, BaseTunerLayer) and (rewrites or module.merged):
            return
        if isinstance(module, ModulesToSaveWrapper):
            return  # replaced, such as a new head, which the base starts at random
        inner = "base_layer" if hasattr(module, "base_layer") else "original_module"
        module = getattr(module, inner)
    yield from (weight for weight in module._parameters.values() if weight is not None)
    for child in module.children():
        yield from _parameters(child, rewrites)


def _rewrites_base(config: Any) -> bool:
    """Return whether an adapter starts by changing the base layers, as PiSSA and LoftQ do."""
    starts = (getattr(config, f"init{name}_weights", None) for name in ("", "_lora"))
    return any(isinstance(start, str) for start in starts)


def _folders(model: Any, directory: Path, adapters: Sequence[str] | None) -> list[Path]:
    """Return where the adapters of a model are saved."""
    if not hasattr(model, "get_base_model"):
        return [directory]  # transformers' own
    names = adapters or list(model.peft_config)
    return [directory if name == "default" else directory / name for name in names]


def _is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file()


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
