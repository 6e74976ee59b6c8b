"""How a model family deviates from the general rule."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from hf_rope_ext.errors import UnsupportedModelError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Method

Config = Any
"""A transformers config; the library ships no usable types."""


@dataclass(frozen=True)
class Family:
    """How a model family deviates from the general rule, which the defaults describe.

    Args:
        model_types: ``model_type`` of the configs concerned, text configs or whole ones.
        text_configs: Dotted paths from the whole config to those of its text towers, where
            ``get_text_config()`` does not find all of them.
        table: Name of the attribute that holds a sin/cos table instead of a rotary module.
        base: The base of the frequencies, where the config lacks it.
        unscaled: Names of rotary modules (last part of the path) that are never scaled.
        windowed: Labels of rotary parameters used only by layers with a bounded attention window,
            where the label does not show it.
        axes: Names of the rows of M-RoPE positions, by default time, height and width; in a vision
            tower, of the coordinates of a patch, by default height and width.
        next_text: Where the model resumes text after an image or a video, see `VisualPositions`;
            None if it follows none of those rules.
        frames_apart: Whether videos are split into single frames with text between them, so that
            time is constant within a block of visual tokens.
        reads_config: Whether the rotary module recomputes its frequencies in every forward pass.
        norm_after_rope: Whether queries and keys are normalised after rotation, which cancels
            ``attention_scaling``.
        softmax_mscale: Whether ``mscale_all_dim`` multiplies the attention's softmax scale.
        fixed_theta: Whether ``rope_theta`` must not change: because layers that are not extended
            use it too, or because the bases are stored elsewhere.
        stock_types: The ``rope_type`` values for which the family's stock code rotates the same
            pairs as the trained model; None for all.
        sized_by_length: Whether ``max_position_embeddings`` is the size of a weight, and so must
            not change.
        keeps: Keys of scaled ``rope_parameters`` that the family's forward pass reads.
        length_dependent: Why length-dependent methods are not supported; None if they are.
        cacheless: Why the model cannot run on two tokens with a cache, to prove that plans pass
            through it; None if it can.
        probe: From a model of the family to arguments for a run on two positions, where tokens
            alone do not suffice.
        refused: Why the family is not supported; None if it is.
        advice: From method and geometry to the vendor's advice, if any.
        row_ends: Whether a token ends each row of an image, and two more delimit the image.
    """

    model_types: tuple[str, ...]
    text_configs: tuple[str, ...] = ()
    table: str | None = None
    base: float | None = None
    unscaled: tuple[str, ...] = ()
    windowed: tuple[str, ...] = ()
    axes: tuple[str, ...] | None = None
    next_text: str | None = "spatial"
    frames_apart: bool = False
    reads_config: bool = False
    norm_after_rope: bool = False
    softmax_mscale: bool = False
    fixed_theta: bool = False
    stock_types: tuple[str, ...] | None = None
    sized_by_length: bool = False
    keeps: tuple[str, ...] = ()
    length_dependent: str | None = None
    cacheless: str | None = None
    probe: Callable[[nn.Module], dict[str, Any]] | None = None
    refused: str | None = None
    advice: Callable[[Method, RopeGeometry], str | None] | None = None
    row_ends: bool = False


def text_configs(config: Config) -> list[Config]:
    """Return the configs of the text towers inside a whole config.

    Raises:
        UnsupportedModelError: If there are several and none is known to be the one.
    """
    paths = family_of(config).text_configs
    if paths:
        return [_follow(config, path) for path in paths]
    try:
        return [config.get_text_config()]
    except ValueError as error:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} has several text configs and none is known to be "
            f"the one to extend; name it in hf_rope_ext.patches. ({error})"
        ) from error


def family_of(config: Config) -> Family:
    """Return the family of a config's ``model_type``; the general rule for any other."""
    model_type = getattr(config, "model_type", "")
    return _families().get(model_type) or Family(model_types=(model_type,))


def setting(config: Config, name: str, default: Any = None) -> Any:
    """Return an attribute of a config, or the default if it is missing or differs by layer."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # raised by transformers where the value differs between layers
        return default


def _follow(config: Config, path: str) -> Config:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@cache
def _families() -> dict[str, Family]:
    # imported by name, so that this module does not depend on the families
    patches = importlib.import_module("hf_rope_ext.patches")
    return {model_type: family for family in patches.FAMILIES for model_type in family.model_types}
