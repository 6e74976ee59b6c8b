"""The trained geometry of each set of rotary frequencies in a model.

It is read from the config, recomputed in float64, and compared with both the family's own default
function and the live buffer. A buffer that does not follow from the config (cast, uninitialized) is
rebuilt; it is never scaled as it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_rope_ext.errors import RopeError, UnsupportedModelError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.models.family import Config, Family, setting
from hf_rope_ext.models.find import Rotary, find_rotaries

EXACT = 1e-5
"""Largest relative error of a float32 buffer that still counts as computed from the config."""

# types whose config records the trained length next to the extended one, or only the latter
WITH_TRAINED_LENGTH = ("yarn", "llama3", "longrope")
WITHOUT_TRAINED_LENGTH = ("linear", "ntk_alpha", "proportional (scaled)")


@dataclass(frozen=True, eq=False)
class RopeSite:
    """One set of rotary frequencies of a model: a rotary module, or one layer type of it.

    Args:
        rotary: The module it belongs to.
        label: Key of the layer type in nested ``rope_parameters``; None if they are flat.
        geometry: The trained geometry.
        inv_freq: The trained frequencies that the stock model uses, float32, on the CPU, in the
            family's order.
        rope_scaling: The scaling in force, as ``rope_parameters``; ``rope_type`` is ``"default"``
            if the model is unscaled.
        pair_order: The order in which the family stores its pairs; None for the natural one.
        rebuilt: Why ``inv_freq`` differs from the live buffer; None if it does not.
    """

    rotary: Rotary = field(repr=False)
    label: str | None
    geometry: RopeGeometry
    inv_freq: Tensor = field(repr=False)
    rope_scaling: Mapping[str, Any]
    pair_order: list[int] | None = None
    rebuilt: str | None = None

    @property
    def path(self) -> str:
        """Dotted path of the rotary module (or table) from the model passed in."""
        return self.rotary.path

    @property
    def config(self) -> Config:
        """The config that holds its ``rope_parameters``."""
        return self.rotary.config

    @property
    def family(self) -> Family:
        """How the family deviates from the general rule."""
        return self.rotary.family

    @property
    def stock_types(self) -> tuple[str, ...] | None:
        """The ``rope_type`` values for which stock code rotates the trained pairs; None for all."""
        # for any other, transformers computes frequencies in the natural order
        return self.family.stock_types or (None if self.pair_order is None else ("default",))


def read_sites(
    model: nn.Module,
    *,
    layer_types: tuple[str, ...] | None = None,
    original_max_position_embeddings: int | Sequence[int] | None = None,
) -> list[RopeSite]:
    """Return the sets of rotary frequencies of the text model that an extension affects.

    Args:
        model: Any module around a transformers model.
        layer_types: Labels to extend where ``rope_parameters`` are nested. By default those whose
            layers attend to the whole context: layers with a bounded window never meet distances
            beyond those in training.
        original_max_position_embeddings: The trained length, where the config is wrong about it:
            one for all sets, or one for each in their order.

    Raises:
        RopeError: If the model has no rotary embedding, its geometry is ambiguous, or there are not
            as many trained lengths as sets.
    """
    rotaries = find_rotaries(model)
    labels = [label for rotary in rotaries for label in rotary.labels]
    wanted = _wanted_labels(rotaries, labels, layer_types)
    found = [(rotary, label) for rotary in rotaries for label in rotary.labels if label in wanted]
    trained = original_max_position_embeddings
    lengths = trained if isinstance(trained, list | tuple) else [trained] * len(found)
    if len(lengths) != len(found):
        paths = ", ".join(dict.fromkeys(rotary.path for rotary, _ in found))
        raise RopeError(
            f"original_max_position_embeddings={lengths!r} has {len(lengths)} lengths for "
            f"{len(found)} sets of frequencies ({paths})."
        )
    return [
        _read_site(rotary, label, length)
        for (rotary, label), length in zip(found, lengths, strict=True)
    ]


def axial_site(rotary: Rotary, original_max_position_embeddings: int) -> RopeSite:
    """Return the frequencies of a vision tower, which its axes share.

    Raises:
        RopeError: If its geometry is ambiguous.
    """
    live = rotary.live(None)
    with torch.device("cpu"):
        stock, _ = type(rotary.original).compute_axial_rope_parameters(rotary.own_config)  # type: ignore[union-attr]
    geometry = RopeGeometry(
        rotary_dim=2 * live.shape[-1],
        base=float(rotary.own_config.rope_parameters["rope_theta"]),
        original_max_position_embeddings=original_max_position_embeddings,
    )
    scaling = {**rotary.parameters(None), "rope_type": "default"}
    return _verify(RopeSite(rotary, None, geometry, live, scaling), live, stock)


def window(config: Config) -> int | None:
    """Return the size of the attention window; None if no layer has a bounded one."""
    labels = setting(config, "layer_types") or ()
    size = setting(config, "sliding_window")
    active = setting(config, "use_sliding_window", True) is not False
    if not isinstance(size, int) or not active:
        return None
    return size if not labels or any(map(_is_windowed, labels)) else None


def _wanted_labels(
    rotaries: list[Rotary], labels: list[str | None], layer_types: tuple[str, ...] | None
) -> set[str | None]:
    if layer_types is not None:
        unknown = [label for label in layer_types if label not in labels]
        if unknown:
            known = sorted({label for label in labels if label is not None})
            raise RopeError(
                f"layer_types={layer_types!r}: this model has no rotary parameters for "
                f"{unknown[0]!r}. It has: {', '.join(known) or 'one set for all layers'}."
            )
        return set(layer_types)
    windowed = {label for rotary in rotaries for label in rotary.family.windowed}
    open_ended = {label for label in labels if label not in windowed and not _is_windowed(label)}
    return open_ended or set(labels)


def _is_windowed(label: str | None) -> bool:
    return label is not None and ("sliding" in label or "chunked" in label)


def _read_site(rotary: Rotary, label: str | None, trained_length: int | None) -> RopeSite:
    """Read the geometry of a label and compare it with the frequencies of the model."""
    scaling = _found_scaling(rotary, label)
    config = _label_config(rotary.own_config, label)
    live = rotary.live(label)
    parameters = rotary.parameters(label)
    stock = _stock_frequencies(rotary, label, config)
    if stock is not None and stock.shape != live.shape:
        # some default functions ignore partial_rotary_factor, those of scaled types never do
        stock = None
    base = parameters.get("rope_theta") or rotary.family.base or setting(config, "rope_theta")
    if base is None:
        base = _recover_base(live, scaling, rotary.path)
        stock = None
    geometry = RopeGeometry(
        rotary_dim=2 * live.shape[-1],
        base=float(base),
        original_max_position_embeddings=_trained_length(rotary, scaling, trained_length),
        head_dim=_head_dim(config),
    )
    if scaling["rope_type"] in ("proportional", "proportional (scaled)"):
        share = parameters.get("partial_rotary_factor", 1.0)
        geometry = replace(geometry, rotated_pairs=int(share * geometry.rotary_dim // 2))
    if scaling["rope_type"] == "proportional":
        scaling = {**scaling, "rope_type": "default"}
    site = RopeSite(rotary, label, geometry, live, scaling)
    return _verify(site, live, stock)


def _verify(site: RopeSite, live: Tensor, stock: Tensor | None) -> RopeSite:
    """Return the site with valid float32 frequencies; raise if their formula is unknown."""
    expected = site.geometry.inv_freq()
    if stock is not None:
        site, expected = _recognize(site, stock)
    sound = expected.float() if stock is None else stock.float()
    if live.is_meta or site.rope_scaling["rope_type"] != "default":
        return replace(site, inv_freq=sound)
    if live.dtype == torch.float32 and _close(live.cpu(), expected):
        return replace(site, inv_freq=live.detach().cpu().clone())
    return replace(site, inv_freq=sound, rebuilt=_fault(live))


def _recognize(site: RopeSite, stock: Tensor) -> tuple[RopeSite, Tensor]:
    """Return the site with the geometry and the order of its stock frequencies, and these exactly.

    Raises:
        UnsupportedModelError: If no geometry gives them in any order.
    """
    odd = replace(site.geometry, rotary_dim=site.geometry.rotary_dim - 1)
    # such as ERNIE 4.5 VL and Pixtral, which store pairs by axis
    order = stock.argsort(descending=True, stable=True).argsort().tolist()
    for geometry in (site.geometry, odd):
        natural = geometry.inv_freq()
        if _close(stock, natural):
            return replace(site, geometry=geometry), natural
        if stock.shape == natural.shape and _close(stock, natural[order]):
            return replace(site, geometry=geometry, pair_order=order), natural[order]
    raise UnsupportedModelError(
        f"{site.path}: the family computes its frequencies in a way this package does not "
        f"know (model_type={site.config.model_type!r}); nothing was changed."
    )


def _close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected, rtol=EXACT, atol=0.0
    )


def _fault(live: Tensor) -> str:
    if live.dtype != torch.float32:
        return f"it had been cast to {str(live.dtype).removeprefix('torch.')}"
    if not torch.isfinite(live).all() or not live.any():
        return "it held only zeros or non-finite numbers, as after loading through the meta device"
    return "it did not follow from the config's rope_theta"


def _stock_frequencies(rotary: Rotary, label: str | None, config: Config) -> Tensor | None:
    """Return the frequencies of the unscaled config by the family's code, CPU, float32."""
    if rotary.parameters(label).get("rope_theta") is None:
        return None
    if rotary.parameters(label).get("rope_type") == "proportional":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS["proportional"](config, "cpu", layer_type=label)
        return frequencies * rotary.parameters(label).get("factor", 1.0)  # type: ignore[no-any-return]
    compute = getattr(type(rotary.original), "compute_default_rope_parameters", None)
    if compute is None:
        return None
    with torch.device("cpu"):
        frequencies, _ = compute(config) if label is None else compute(config, layer_type=label)
    return frequencies  # type: ignore[no-any-return]


def _found_scaling(rotary: Rotary, label: str | None) -> dict[str, Any]:
    """Return the scaling in force: the type of the live module, the numbers of the config."""
    parameters = rotary.parameters(label)
    live_type = getattr(rotary.original, "rope_type", "default")
    if isinstance(live_type, dict):
        live_type = live_type.get(label, "default")
    configured = parameters.get("rope_type") or parameters.get("type") or live_type
    older = parameters.get("type", configured)
    # "mrope" is a layout and "su" an old name of longrope; both occur beside a rope_type
    if older not in (configured, "default", "mrope", "su"):
        raise RopeError(
            f"{rotary.path}: the config's rope_parameters say type={older!r} and "
            f"rope_type={configured!r}; make them agree. Nothing was changed."
        )
    if live_type == "default" and configured not in ("default", "ntk_alpha"):
        return {**parameters, "rope_type": configured, "edited": True}
    if live_type == "linear" and parameters.get("factor") == 1.0:
        return {**parameters, "rope_type": "default"}
    if live_type == "proportional" and parameters.get("factor", 1.0) != 1.0:
        return {**parameters, "rope_type": "proportional (scaled)"}
    return {**parameters, "rope_type": live_type}


def _trained_length(rotary: Rotary, scaling: Mapping[str, Any], override: int | None) -> int:
    """Return the trained length; 0 where the config does not tell."""
    if override is not None:
        return override
    config, rope_type = rotary.config, scaling["rope_type"]
    if rope_type in WITHOUT_TRAINED_LENGTH:
        return 0
    if rope_type in WITH_TRAINED_LENGTH and not scaling.get("edited"):
        length = scaling.get("original_max_position_embeddings")
        return int(length or setting(config, "original_max_position_embeddings") or 0)
    return int(setting(config, "max_position_embeddings") or 0)


def _recover_base(live: Tensor, scaling: Mapping[str, Any], path: str) -> float:
    """Recover the base from an unscaled buffer, where the config lacks it."""
    pairs = live.shape[-1]
    if pairs > 1 and not live.is_meta and torch.isfinite(live).all() and (live > 0).all():
        slowest = float(live[-1])
        base = math.exp(-math.log(slowest) * pairs / (pairs - 1))
        for candidate in (float(round(base)), base):
            if candidate > 1 and _close(
                live.cpu(), RopeGeometry(2 * pairs, candidate, 1).inv_freq()
            ):
                return candidate
    raise UnsupportedModelError(
        f"{path}: the config has no rope_theta and the live frequencies follow from no single "
        f"base, so it cannot be recovered; set rope_theta in config.rope_parameters "
        f"(found {dict(scaling)!r}). Nothing was changed."
    )


def _label_config(config: Config, label: str | None) -> Config:
    """Return the config of a layer type, where layers have separate configs."""
    if label is not None and setting(config, "is_heterogeneous", False):
        return config.per_layer_config[label]
    return config


def _head_dim(config: Config) -> int | None:
    """Return the width of a query head, rotated dimensions or not."""
    nope, rope = (setting(config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
    if nope and rope:
        return int(nope + rope)
    width, hidden = setting(config, "head_dim"), setting(config, "hidden_size")
    heads = setting(config, "num_attention_heads")
    if not width and not (hidden and heads):
        return None
    return int(width or hidden // heads)
