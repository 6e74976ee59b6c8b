"""What the installed transformers calls the things that this package reaches into.

transformers renames and moves them between releases. Each is found here by looking at signatures,
annotations and objects, never by a version number, and no other module knows their names. What
looking cannot tell is proven on the model (`hf_rope_ext.patching.cache_proof`).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.family import Config

LAST_TESTED = "5.24.0"
"""The newest release that the test suite has passed on; later ones are proven on the model."""

CACHES = ("cache", "past_key_values", "cache_params")
"""What releases and families call the cache, in arguments and in outputs."""

PEFT_CACHE = "past_key_values"
"""What PEFT calls the cache, on every release."""

CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""The methods that generate for many requests in one paged cache."""

PREPARE_CACHE = "_prepare_cache_for_generation"
"""The method of ``generate`` that prepares the cache, where the length of the request is known."""

PREPARE_POSITIONS = "_prepare_position_ids_for_generation"
"""The method of ``generate`` that prepares positions."""

PREPARE_INPUTS = "prepare_inputs_for_generation"
"""The method that prepares the arguments of each call of ``generate``."""

POSITION_RULE = "get_rope_index"
"""The method of a vision-language model that computes the positions of a request."""

TRAINED_LENGTH = "original_max_position_embeddings"
"""The attribute of a config with the trained length of LongRoPE."""

POSITION_NOTES = ("rope_deltas", "_cached_decode_position_ids", "_prefill_len")
"""Attributes in which vision-language models keep positions from one call to the next, the first
in every one of them; None before the first request."""


def describe_release() -> str:
    """Return the installed release beside the last one tested, for error messages."""
    import transformers

    return f"transformers {transformers.__version__} (tested up to {LAST_TESTED})"


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name of a forward's cache argument; None if it takes none."""
    parameters = inspect.signature(forward).parameters
    annotated = (name for name, own in parameters.items() if "Cache" in str(own.annotation))
    return next((name for name in CACHES if name in parameters), next(annotated, None))


def pass_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument that a model, or one inside a wrapper, takes it by.

    Raises:
        RopeError: If it takes none.
    """
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            name = cache_argument(part.forward)
            if name is not None:
                return {name: cache}
            break
    raise RopeError(f"{type(model).__name__} takes no cache in {describe_release()}.")


def without_cache(model: Any) -> dict[str, Any]:
    """Return the keyword argument that keeps a model from making a cache, if it takes one."""
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, whatever its name; None if there is none."""
    for name in CACHES:
        if arguments.get(name) is not None:
            return arguments[name]
    return next(filter(is_cache, arguments.values()), None)


def is_paged(cache: Any) -> bool:
    """Return whether the rows of all requests are one in a cache (continuous batching)."""
    return not is_cache(cache)


def with_cache_named(arguments: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Return keyword arguments in which a cache has the name that the installed release gives it.

    Callers may use the name of any release; stock transformers knows its own and some older ones.

    Raises:
        RopeError: If there are two caches.
    """
    renamed = dict(arguments)
    for other in CACHES:
        if name is None or other == name or not is_cache(renamed.get(other)):
            continue
        cache = renamed.pop(other)
        if renamed.setdefault(name, cache) is None:
            renamed[name] = cache
        elif renamed[name] is not cache:
            raise RopeError(f"{other} and {name} are names of one argument; pass one cache.")
    return renamed


def output_cache(output: Any) -> Any:
    """Return the cache in a model's output, whatever its name; None if there is none."""
    if not isinstance(output, Mapping | tuple):
        output = getattr(output, "__dict__", {})
    parts = output.values() if isinstance(output, Mapping) else output
    return next(filter(is_cache, parts), None)


def new_cache(config: Config) -> Any:
    """Return an empty growing cache for a model of this config."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def generates(model: Any) -> bool:
    """Return whether a model has ``generate``."""
    from transformers import GenerationMixin

    return isinstance(model, GenerationMixin)


def switches_frequencies(model: Any) -> bool:
    """Return whether a model drops its cache where a request grows beyond the trained length.

    The Phi-3 family does, since its stock LongRoPE then has other frequencies. Before transformers
    5.20 it also forgets to run the tokens of the dropped cache again.
    """
    code = inspect.unwrap(getattr(type(model), PREPARE_INPUTS, generates)).__code__
    return TRAINED_LENGTH in (*code.co_consts, *code.co_names)


def self_attention_cache(cache: Any) -> Any:
    """Return the self-attention part of a cache."""
    return getattr(cache, "self_attention_cache", cache)


def empty_cache(cache: Any) -> None:
    """Remove every token from a cache."""
    cache.reset()
    left = int(cache.get_seq_length())
    if left:  # before transformers 5.18 a growing cache keeps as many zeros
        cache.crop(-left)


def fixed_size(cache: Any) -> int | None:
    """Return the capacity of a cache of fixed size in tokens, None for a growing one."""
    from transformers.cache_utils import StaticLayer

    sizes = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    return max(sizes, default=None)


def row_count(cache: Any) -> int | None:
    """Return the number of rows in a cache; None if it holds no keys yet."""
    keys = (getattr(layer, "keys", None) for layer in cache.layers)
    return next((held.shape[0] for held in keys if isinstance(held, Tensor)), None)


def is_quantized(layer: Any) -> bool:
    """Return whether a layer of a cache keeps quantized keys."""
    return hasattr(layer, "_quantized_keys") or hasattr(layer, "_dequantize")


@dataclass(frozen=True)
class GenerateRequest:
    """What ``generate`` knows where it prepares the cache.

    Args:
        config: Its generation config.
        arguments: What it will pass to the model.
        length: Final number of tokens of the longest row.
    """

    config: Any
    arguments: dict[str, Any]
    length: int

    @property
    def positions(self) -> Tensor | None:
        """The positions of the tokens so far; None where the model computes them in its call."""
        positions = self.arguments.get("position_ids")
        return positions if isinstance(positions, Tensor) else None

    @classmethod
    def is_known(cls, model_class: type) -> bool:
        """Return whether a model class prepares its cache in a known way."""
        prepare = getattr(model_class, PREPARE_CACHE, lambda: None)
        known = set(inspect.signature(prepare).parameters)
        return {"generation_config", "model_kwargs", "max_cache_length"} <= known

    @classmethod
    def from_call(
        cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "GenerateRequest":
        """Return what one call of `PREPARE_CACHE` was given."""
        values = signature.bind(*args, **kwargs).arguments
        # the last token is never run, so it needs no room in the cache
        length = values["max_cache_length"] + 1
        return cls(values["generation_config"], values["model_kwargs"], length)

    def positions_of_text(
        self, model: Any, input_ids: Tensor | None, given: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the positions that a whole text has in an empty cache.

        Those of a vision-language model continue from a filled cache, images or not.

        Args:
            model: The model that generates.
            input_ids: The whole text.
            given: The arguments of ``generate``, of which images are encoded by now.

        Returns:
            What replaces `positions`; None where the model computes them in its call.
        """
        prepare, positions = getattr(model, PREPARE_POSITIONS, None), self.positions
        if given.get("position_ids") is not None:
            return positions
        if prepare is None or positions is None or input_ids is None:
            return None
        without_cache = {name: value for name, value in given.items() if not is_cache(value)}
        prepared = prepare(input_ids, without_cache)
        rows = positions.shape[-2] // prepared.shape[-2]  # repeated for beams
        return prepared.repeat_interleave(rows, dim=-2)  # type: ignore[no-any-return]

    def has_whole_text(self, input_ids: Tensor | None) -> bool:
        """Return whether it was given the text that a cache holds too, or only what follows it.

        This is transformers' own test.
        """
        if self.arguments.get("inputs_embeds") is not None:
            return True
        mask = self.arguments.get("attention_mask")
        tokens = getattr(self.config, "_mask_length", -1) if mask is None else mask.shape[1]
        return input_ids is not None and input_ids.shape[1] == tokens


def mrope_section(rotary: Any, label: str | None = None) -> tuple[int, ...]:
    """Return a rotary module's number of pairs per position axis; empty for one-dimensional ones.

    Args:
        rotary: The module. In transformers 5.16 some leave the section to the attention, and
            only their config has it.
        label: The layer type, where sections differ.
    """
    section = getattr(rotary, "mrope_section", None)
    if section is None:
        parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
        by_layer = {key: own for key, own in parameters.items() if isinstance(own, Mapping)}
        owners = by_layer or {None: parameters}
        section = {key: own.get("mrope_section") for key, own in owners.items()}
    if isinstance(section, Mapping):
        section = section.get(label) or next(filter(None, section.values()), None)
    return tuple(section or ())


def pick_axes(rotary: Any, label: str | None, values: Tensor) -> Tensor:
    """Return cosines or sines as they reach queries and keys.

    In transformers 5.16 Qwen2-VL and its relatives leave it to the attention to take each
    section of a half from the row of its axis.

    Args:
        rotary: The stock rotary module.
        label: The layer type.
        values: Its cosines or sines, ``(batch, seq, width)`` or ``(axes, batch, seq, width)``.
    """
    section = mrope_section(rotary, label)
    if values.ndim < 4 or getattr(rotary, "mrope_section", None) is not None:
        return values
    parts = torch.split(values, list(section * 2), dim=-1)
    return torch.cat([part[turn % len(section)] for turn, part in enumerate(parts)], dim=-1)


def training_setting(name: str) -> str:
    """Return what the installed TrainingArguments call a setting that was renamed in 5.23."""
    from transformers import TrainingArguments

    older = name.replace("activation_checkpointing", "gradient_checkpointing")
    return name if name in TrainingArguments.__dataclass_fields__ else older


ATTENTION = "_attn_implementation_internal"
"""The attribute of a config with the name of its attention."""


def register_attention(
    name: str, attention: Callable[..., Any], mask: Callable[..., Any] | None = None
) -> None:
    """Make an attention known to transformers under a name, by default with the masks of SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attention)
    # without a twin of the same name transformers hands over no mask, padding or not
    AttentionMaskInterface.register(name, mask or sdpa_mask)


def sdpa_mask(**kwargs: Any) -> Tensor | None:
    """Return the mask that SDPA gets."""
    from transformers.masking_utils import sdpa_mask as make

    return make(**kwargs)  # type: ignore[no-any-return]


def is_plain_causal(pattern: Any) -> bool:
    """Return whether a mask function is the plain causal one."""
    from transformers.masking_utils import causal_mask_function

    return pattern is causal_mask_function


def takes_attention(model: Any) -> bool:
    """Return whether a model computes its attention by the registered function it is told to."""
    return bool(model._can_set_attn_implementation())


def attention_name(config: Config) -> str | None:
    """Return the name of the attention that a config asks for."""
    return config._attn_implementation  # type: ignore[no-any-return]


def set_attention_name(config: Config, name: str | None) -> None:
    """Set the name of the attention that a config asks for."""
    config._attn_implementation = name


def is_cache(value: Any) -> bool:
    """Return whether a value is a cache that knows how many tokens it holds.

    By looking, since torch 2.11 cannot compile an import.
    """
    return hasattr(value, "get_seq_length")
