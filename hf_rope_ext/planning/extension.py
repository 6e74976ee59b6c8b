"""What a longer context would mean for a model, from its config alone."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import RopeError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Method, NoScaling, Yarn
from hf_rope_ext.methods.attention_method import seen_distances
from hf_rope_ext.models.family import Config, setting
from hf_rope_ext.models.sites import RopeSite, read_sites, window
from hf_rope_ext.rotary.axes import read_axes
from hf_rope_ext.saving.engines import TARGETS, export
from hf_rope_ext.saving.loading import skeleton


@dataclass(frozen=True)
class Inspection:
    """One set of rotary frequencies, as shown by ``hf-rope inspect``.

    Args:
        model_type: Of the text model.
        path: Of the rotary module.
        layer_type: The layer type it serves; None for all.
        scaling: The scaling that the model was trained with, as ``rope_parameters``.
        patch: The record of the patch that the model was saved with, None without one.
        rope_theta: The base.
        rotary_dim: Rotated dimensions of a head.
        head_dim: All dimensions of a head.
        original_max_position_embeddings: Trained length in positions; 0 if the config lacks it.
        wavelengths: Positions per rotation of each pair; None at frequency 0.
        turns: Rotations of each pair over the trained length.
        unfinished_pairs: Pairs that never complete a rotation in training, so that they meet unseen
            angles beyond the trained length.
        window: Size of the attention window in positions; None if every layer attends to all.
    """

    model_type: str
    path: str
    layer_type: str | None
    scaling: Mapping[str, Any]
    rope_theta: float
    rotary_dim: int
    head_dim: int | None
    original_max_position_embeddings: int
    wavelengths: list[float | None]
    turns: list[float]
    unfinished_pairs: int
    window: int | None
    patch: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Effect:
    """The effect of a method on the pairs of a model at a target length.

    Args:
        method: Name of the method.
        kept: Number of pairs with their trained frequency.
        slowed_in_full: Number of pairs slowed by the factor or more.
        between: Number of pairs slowed by less.
        unseen: Number of pairs that never complete a rotation in training and exceed their largest
            trained angle at the target length.
        attention_scaling: Multiplier of cos and sin.
        nearest: Slowdown of the fastest pair, that is, the loss of resolution between neighbours.
    """

    method: str
    kept: int
    between: int
    slowed_in_full: int
    unseen: int
    attention_scaling: float
    nearest: float


def inspect_config(config: Config, patch: Mapping[str, Any] | None = None) -> list[Inspection]:
    """Return what a model's config says about its rotary embeddings.

    Args:
        config: The config as before any recorded patch.
        patch: The record of the patch, as `hf_rope_ext.saving.loading.read_config` returns it.

    Raises:
        RopeError: If it describes no model with a rotary embedding.
    """
    return [_inspect(site, patch) for site in read_sites(skeleton(config))]


def text_site(config: Config, original_max_position_embeddings: int | None = None) -> RopeSite:
    """Return the set of frequencies that limits the context of a model.

    Raises:
        RopeError: If the trained length is not in the config.
    """
    site = read_sites(
        skeleton(config), original_max_position_embeddings=original_max_position_embeddings
    )[0]
    if not site.geometry.original_max_position_embeddings:
        raise RopeError(
            f"the trained length is not in the config ({dict(site.rope_scaling)!r}); give "
            f"original_max_position_embeddings."
        )
    return read_axes(site)


def effect(method: Method, geometry: RopeGeometry, target: int) -> Effect:
    """Return the effect of a method on a request of ``target`` positions."""
    frozen = method.freeze(geometry, target) if method.length_dependent else method
    plan = frozen.plan(geometry)
    trained, planned = geometry.inv_freq(), plan.inv_freq
    slowdown = trained / planned.clamp(min=1e-300)
    factor = target / geometry.original_max_position_embeddings
    kept = torch.isclose(planned, trained, rtol=1e-9, atol=0.0)
    full = ~kept & (slowdown >= factor * (1 - 1e-9))
    seen = trained * geometry.original_max_position_embeddings
    length = geometry.original_max_position_embeddings
    distances = seen_distances(frozen, torch.arange(target), length, target - 1)
    reach = float(distances.nan_to_num(0.0).max()) + 1
    unseen = (seen < 2 * math.pi) & (planned * reach > seen * (1 + 1e-9))
    return Effect(
        method=method.name,
        kept=int(kept.sum()),
        between=int((~kept & ~full).sum()),
        slowed_in_full=int(full.sum()),
        unseen=int(unseen.sum()),
        attention_scaling=float(plan.attention_scaling),
        nearest=float(slowdown[0]),
    )


def cache_bytes(config: Config, length: int, bytes_per_number: int = 2) -> int:
    """Return the size of the keys and values of one sequence of ``length`` positions.

    Layers with a sliding window cache that window; recurrent and linear layers, nothing that grows.
    """
    layers = setting(config, "num_hidden_layers") or 0
    kinds = setting(config, "layer_types") or ["full_attention"] * layers
    bound = setting(config, "sliding_window")
    if not setting(config, "layer_types") and setting(config, "use_sliding_window", True) and bound:
        kinds = ["sliding_attention"] * layers
    total = 0
    for index, kind in enumerate(kinds):
        if "attention" not in kind or "linear" in kind:
            continue
        kept = min(length, bound) if "sliding" in kind and bound else length
        total += kept * _numbers_per_position(_layer_config(config, index))
    return total * bytes_per_number


def decay(inv_freq: Tensor, distances: Tensor) -> Tensor:
    """Return the bound on attention at each distance (RoFormer, arXiv:2104.09864, sec. 3.4.3).

    Args:
        inv_freq: Frequencies, ``(pairs,)``.
        distances: In positions, ``(distances,)``.

    Returns:
        The mean magnitude of the partial sums of ``exp(i * distance * inv_freq)``, relative to its
        value at distance 0, ``(distances,)``.
    """
    angles = distances[:, None].double() * inv_freq[None, :].double()
    sums = torch.polar(torch.ones_like(angles), angles).cumsum(dim=1)
    return sums.abs().mean(dim=1) / ((len(inv_freq) + 1) / 2)


@dataclass(frozen=True)
class ExtensionPlan:
    """What it takes to reach a length.

    Args:
        trained_length: In positions.
        target_length: In positions.
        factor: Their ratio.
        cache_bytes: Size of the keys and values of one sequence of the target length.
        effects: Effect of each method on the pairs, by label.
        advice: The vendor's advice on these methods, and other caveats.
        exported: The method of ``exports``: YaRN if it is among the methods, or else the first that
            changes the model; None if none does.
        exports: How to configure each engine for that method, or why it is impossible.
    """

    trained_length: int
    target_length: int
    factor: float
    cache_bytes: int
    effects: dict[str, Effect]
    advice: tuple[str, ...]
    exported: str | None
    exports: dict[str, str]


def plan_extension(
    config: Config,
    site: RopeSite,
    target: int,
    methods: Mapping[str, Method],
    number_bytes: int,
    tokens: int | None = None,
) -> ExtensionPlan:
    """Return what it takes to extend a model to a target length.

    Args:
        config: The whole config.
        site: The result of `text_site` for it.
        target: In positions.
        methods: Methods to compare, by label.
        number_bytes: Size of a number in the cache.
        tokens: Number of tokens at that many positions, if different.

    Raises:
        RopeError: If the target is within the trained length.
    """
    trained = site.geometry.original_max_position_embeddings
    if target <= trained:
        raise RopeError(f"the target {target} is within the trained length {trained}.")
    factor = target / trained
    changing = [label for label, method in methods.items() if not isinstance(method, NoScaling)]
    chosen = next((label for label in changing if type(methods[label]) is Yarn), None)
    chosen = chosen or next(iter(changing), None)
    return ExtensionPlan(
        trained_length=trained,
        target_length=target,
        factor=factor,
        cache_bytes=cache_bytes(site.config, tokens or target, number_bytes),
        effects={label: effect(method, site.geometry, target) for label, method in methods.items()},
        advice=_advice(site, methods.values(), target, tokens or target),
        exported=chosen,
        exports={} if chosen is None else _exports(config, methods[chosen], trained),
    )


def _exports(config: Config, method: Method, trained: int) -> dict[str, str]:
    """Return how to configure each engine for a method, or why it is impossible."""
    exports = {}
    for engine in TARGETS:
        try:
            exported = export(
                config,
                engine,
                method=method,
                replace=True,
                original_max_position_embeddings=trained,
            )
        except RopeError as error:
            exports[engine] = f"not expressible: {error}"
        else:
            exports[engine] = exported.command_line or json.dumps(exported.config)
    return exports


def curves(geometry: RopeGeometry, methods: Mapping[str, Method], factor: float) -> dict[str, Any]:
    """Return the data of ``hf-rope plot``, by pair and by distance, as JSON data."""
    trained = geometry.original_max_position_embeddings
    target = round(factor * trained)
    distances = torch.logspace(0, math.log10(2 * target), 200).round()
    result: dict[str, Any] = {
        "trained_length": trained,
        "target_length": target,
        "distances": distances.tolist(),
        "methods": {},
    }
    for label, method in methods.items():
        frozen = method.freeze(geometry, target)
        inv_freq = frozen.plan(geometry).inv_freq
        seen = seen_distances(frozen, distances, trained, int(distances.max()))
        result["methods"][label] = {
            "wavelengths": _wavelengths(inv_freq),
            # None where a key so far back is not seen
            "decay": [None if math.isnan(one) else one for one in decay(inv_freq, seen).tolist()],
        }
    return result


def _advice(site: RopeSite, methods: Iterable[Method], target: int, tokens: int) -> tuple[str, ...]:
    notes = []
    if site.family.advice is not None:
        advice = (site.family.advice(method, site.geometry) for method in methods)
        notes += [note for note in advice if note is not None]
    if tokens != target:
        notes.append(
            f"other engines limit requests in tokens: set vLLM's --max-model-len, SGLang's "
            f"--context-length or llama.cpp's --ctx-size to {tokens}."
        )
    return tuple(dict.fromkeys(notes))


def _inspect(site: RopeSite, patch: Mapping[str, Any] | None) -> Inspection:
    geometry = site.geometry
    trained = geometry.original_max_position_embeddings
    inv_freq = geometry.inv_freq()
    turns = inv_freq * trained / (2 * math.pi)
    return Inspection(
        model_type=site.config.model_type,
        path=site.path,
        layer_type=site.label,
        scaling=dict(site.rope_scaling),
        rope_theta=geometry.base,
        rotary_dim=geometry.rotary_dim,
        head_dim=geometry.head_dim,
        original_max_position_embeddings=trained,
        wavelengths=_wavelengths(inv_freq),
        turns=turns.tolist(),
        unfinished_pairs=int(((turns < 1) & (inv_freq > 0)).sum()) if trained else 0,
        window=window(site.config),
        patch=patch,
    )


def _wavelengths(inv_freq: Tensor) -> list[float | None]:
    return [2 * math.pi / value if value > 0 else None for value in inv_freq.tolist()]


def _layer_config(config: Config, index: int) -> Config:
    if setting(config, "is_heterogeneous", False):
        return config.per_layer_config[index]
    return config


def _numbers_per_position(config: Config) -> int:
    """Return how many numbers one layer caches per position."""
    latent, rope = setting(config, "kv_lora_rank"), setting(config, "qk_rope_head_dim")
    if latent and rope:
        return int(latent + rope)
    heads = setting(config, "num_attention_heads")
    width = setting(config, "head_dim") or setting(config, "hidden_size") // heads
    return int(2 * (setting(config, "num_key_value_heads") or heads) * width)
