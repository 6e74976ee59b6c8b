"""Locate the rotary embeddings of a model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.checks import shown
from hf_rope_ext.errors import UnsupportedModelError
from hf_rope_ext.models.family import Config, Family, family_of, text_configs


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary module, or the table in its place, and its place in the model.

    Args:
        path: Dotted path from the model passed in.
        parent: The module that holds it.
        name: Its attribute name there.
        original: The module or the table.
        config: The config of its tower.
        family: How the family deviates from the general rule.
    """

    path: str
    parent: nn.Module
    name: str
    original: nn.Module | Tensor
    config: Config
    family: Family

    @property
    def own_config(self) -> Config:
        """The config that the module itself reads; its base can differ from that of the tower."""
        return getattr(self.original, "config", self.config)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The layer types it serves; ``(None,)`` if it does not distinguish any."""
        if isinstance(self.original, Tensor) or not hasattr(self.original, "rope_type"):
            return (None,)
        if hasattr(self.original, "inv_freq"):
            return (None,)
        suffix = "_original_inv_freq"
        buffers = [name for name, _ in self.original.named_buffers(recurse=False)]
        return tuple(name.removesuffix(suffix) for name in buffers if name.endswith(suffix))

    def parameters(self, label: str | None) -> dict[str, Any]:
        """Return the ``rope_parameters`` of a label; empty if the config has none."""
        parameters = getattr(self.own_config, "rope_parameters", None) or {}
        return (parameters if label is None else parameters.get(label)) or {}

    def live(self, label: str | None) -> Tensor:
        """Return the frequencies in use, float32."""
        if isinstance(self.original, Tensor):
            return table_frequencies(self.original)
        if isinstance(self.original, nn.Embedding):
            return table_frequencies(self.original.weight)
        name = "inv_freq" if label is None else f"{label}_inv_freq"
        return getattr(self.original, name)  # type: ignore[no-any-return]

    def scaling(self, label: str | None) -> float:
        """Return the multiplier of cos and sin."""
        name = "attention_scaling" if label is None else f"{label}_attention_scaling"
        return float(getattr(self.original, name, 1.0))


def find_rotaries(model: nn.Module) -> list[Rotary]:
    """Return the stock rotary modules of the text model inside ``model``.

    Raises:
        UnsupportedModelError: If there are none, or ``model`` contains no transformers model.
    """
    root = _root(model)
    whole = family_of(root.config)
    if whole.refused is not None:
        raise UnsupportedModelError(
            f"model_type={root.config.model_type!r} cannot be extended: {whole.refused}. Nothing "
            f"was changed."
        )
    configs = text_configs(root.config)
    rotaries = []
    for rotary in _all_rotaries(model):
        # either config can be the text config: that of the module, or that of the tower
        for config in (rotary.own_config, rotary.config):
            if any(config is known for known in configs):
                family = family_of(config)
                if whole.length_dependent is not None:
                    family = replace(family, length_dependent=whole.length_dependent)
                rotaries.append(replace(rotary, config=config, family=family))
                break
    if not rotaries:
        raise UnsupportedModelError(_no_rotary(root, configs))
    return rotaries


def find_towers(model: nn.Module) -> list[Rotary]:
    """Return the stock axial rotary modules of the vision towers inside ``model``.

    Raises:
        UnsupportedModelError: If there are none, or ``model`` contains no transformers model.
    """
    root = _root(model)
    towers = []
    for path, module, config in owned_modules(model):
        parent, _, name = path.rpartition(".")
        if getattr(module, "rope_type", None) == "axial" and "inv_freq" in module._buffers:
            parts = (model.get_submodule(parent), name, module, config, family_of(config))
            towers.append(Rotary(path, *parts))
    if not towers:
        raise UnsupportedModelError(_no_tower(model, root))
    return towers


def table_frequencies(table: Tensor) -> Tensor:
    """Recover the frequencies of a sin/cos table, ``(pairs,)``.

    Row 1 is position 1, so its sines and cosines give the angle of each pair per position.
    """
    sin, cos = table[1].float().chunk(2)
    return torch.atan2(sin, cos)


def owned_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Config]]:
    """Yield every module with its path and the config of the nearest enclosing transformers model.

    The config tells the towers of a composite model apart. Modules outside any are skipped.
    """
    from transformers import PreTrainedModel

    owners: dict[str, Config] = {}
    for path, module in model.named_modules():
        config = owners.get(path.rpartition(".")[0])
        owners[path] = module.config if isinstance(module, PreTrainedModel) else config
        if owners[path] is not None:
            yield path, module, owners[path]


def innermost_models(model: nn.Module, rotaries: Iterable[str]) -> list[list[nn.Module]]:
    """Return the innermost models with rotary embeddings, each followed by its enclosing models.

    The enclosing ones serve where an inner model, such as a decoder, cannot run on tokens alone.

    Args:
        model: The model that paths are relative to.
        rotaries: Paths of rotary embeddings.
    """
    from transformers import PreTrainedModel

    around = {
        path: part for path, part, _ in owned_modules(model) if isinstance(part, PreTrainedModel)
    }
    chains: dict[int, list[nn.Module]] = {}
    for path in rotaries:
        chain = [
            part
            for outer, part in around.items()
            if f"{path}.".startswith(f"{outer}.") or not outer
        ]
        chains[id(chain[-1])] = chain[::-1]
    return list(chains.values())


def _root(model: nn.Module) -> Any:
    """Return the outermost transformers model inside a module."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is a torch.nn.Module around a transformers model, got {shown(model)}."
        )
    root = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if root is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no transformers model, hence no config that describes "
            f"its RoPE; nothing was changed."
        )
    return root


def _all_rotaries(model: nn.Module) -> Iterator[Rotary]:
    """Yield every rotary module and table inside ``model``, of any tower."""
    for path, module, config in owned_modules(model):
        family = family_of(config)
        parent, _, name = path.rpartition(".")
        table = module._buffers.get(family.table) if family.table else None
        if _is_rotary(module, family) and name not in family.unscaled:
            yield Rotary(path, model.get_submodule(parent), name, module, config, family)
        elif family.table and table is not None:
            yield Rotary(f"{path}.{family.table}", module, family.table, table, config, family)


def _is_rotary(module: nn.Module, family: Family) -> bool:
    if getattr(module, "rope_type", None) == "axial":
        return False
    if family.table is not None and isinstance(module, nn.Embedding):
        return "Positional" in type(module).__name__
    return "RotaryEmbedding" in type(module).__name__ and any(
        name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)
    )


def _no_rotary(root: nn.Module, configs: list[Config]) -> str:
    positional = [
        f"{path} ({type(module).__name__})"
        for path, module in root.named_modules()
        if "position" in path.rpartition(".")[2].lower()
        or any(word in type(module).__name__ for word in ("Rotary", "Position", "Alibi"))
    ]
    model_type = getattr(configs[0], "model_type", "?")
    return (
        f"no rotary embedding in the text model of {type(root).__name__} "
        f"(model_type={model_type!r}); nothing was changed. Position modules found: "
        f"{', '.join(positional[:4]) or 'none'}. If the model does rotate queries and keys, "
        f"describe its family in hf_rope_ext.patches."
    )


def _no_tower(model: nn.Module, root: Any) -> str:
    texts = [root.config.get_text_config()] if hasattr(root.config, "get_text_config") else []
    positional: dict[str, list[str]] = {}
    for path, module, config in owned_modules(model):
        if config is root.config or any(config is text for text in texts):
            continue
        names = positional.setdefault(config.model_type, [])
        if "position" in path.rpartition(".")[2].lower() or "Rotary" in type(module).__name__:
            names.append(f"{path} ({type(module).__name__})")
        names += [
            f"{path}.{name}" for name in module._parameters if "position" in name or "pos_" in name
        ]
    towers = "; ".join(
        f"{model_type}: {', '.join(names[:3]) or 'no positions'}"
        for model_type, names in positional.items()
    )
    return (
        f"no axial rotary embedding in a vision tower of {type(root).__name__} "
        f"(model_type={root.config.model_type!r}), so there are no frequencies to scale for larger "
        f"images; nothing was changed. Other towers and their positions: {towers or 'none'}."
    )
