"""What a model family does differently from the general rule."""

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
    """What one model family does differently from the general rule; the defaults are the rule.

    Args:
        model_types: ``model_type`` of the configs this is true of, text configs or whole ones.
        text_configs: Dotted paths from the whole config to the configs of its text towers, where
            ``get_text_config()`` does not find them all.
        table: Name of the attribute that holds a table of sin and cos in place of a rotary module.
        base: The base of the frequencies, where the config does not hold it.
        unscaled: Last part of the path of rotary modules that are unscaled by design.
        windowed: Labels of rotary parameters that serve only layers with a bounded window, where
            the label itself does not say so.
        axes: Names of the rows of M-RoPE's positions; time, height and width when not given. Of a
            vision tower, of a patch's coordinates; height and width when not given.
        next_text: Where the model places text behind an image or a video; see `VisualPositions`.
            None where it follows none of those rules.
        frames_apart: Whether videos are cut into single frames with text between them, so that the
            positions of a block do not differ in time.
        pair_order: From the config to the order in which the family stores its pairs.
        reads_config: Whether the rotary module computes its frequencies in every forward.
        norm_after_rope: Whether queries and keys are normalised after rotation, so that
            ``attention_scaling`` cancels out.
        softmax_mscale: Whether the attention multiplies its softmax scale for ``mscale_all_dim``.
        fixed_theta: Whether ``rope_theta`` must stay as it is: layers that are not extended compute
            with it too, or none does because the bases stand elsewhere.
        stock_types: The ``rope_type`` values the family's stock code computes with the same pairs
            as the trained model; None for all.
        sized_by_length: Whether ``max_position_embeddings`` is the size of a weight, so that it
            must not change.
        keeps: Keys of the scaled ``rope_parameters`` that the family's forward reads.
        length_dependent: Why length-dependent methods cannot be served; None where they can.
        probe: From a model of the family to arguments for running it on two positions, where
            tokens alone do not run it.
        refused: Why the family cannot be served; None where it can.
        advice: From method and geometry to what the vendor says about it, if anything.
        row_ends: Whether each row of an image ends in a token, and an image in two more.
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
    pair_order: Callable[[Config], list[int]] | None = None
    reads_config: bool = False
    norm_after_rope: bool = False
    softmax_mscale: bool = False
    fixed_theta: bool = False
    stock_types: tuple[str, ...] | None = None
    sized_by_length: bool = False
    keeps: tuple[str, ...] = ()
    length_dependent: str | None = None
    probe: Callable[[nn.Module], dict[str, Any]] | None = None
    refused: str | None = None
    advice: Callable[[Method, RopeGeometry], str | None] | None = None
    row_ends: bool = False


def text_configs(config: Config) -> list[Config]:
    """Return the configs of the text towers of a whole config.

    Raises:
        UnsupportedModelError: If it has several and none is known to be the one.
    """
    paths = family_of(config).text_configs
    if paths:
        return [_follow(config, path) for path in paths]
    try:
        return [config.get_text_config()]
    except ValueError as error:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} has several text configs: {error}"
        ) from error


def family_of(config: Config) -> Family:
    """Return what is special about a config's ``model_type``; the general rule if nothing is."""
    model_type = getattr(config, "model_type", "")
    return _families().get(model_type) or Family(model_types=(model_type,))


def setting(config: Config, name: str, default: Any = None) -> Any:
    """Return an attribute of a config, or the default where it is not there or not one value."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # transformers refuses to read a value that differs between layers
        return default


def _follow(config: Config, path: str) -> Config:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@cache
def _families() -> dict[str, Family]:
    # by name, so that this module does not depend on any family
    patches = importlib.import_module("hf_rope_ext.patches")
    return {model_type: family for family in patches.FAMILIES for model_type in family.model_types}
