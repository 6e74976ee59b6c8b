"""Reading transformers' caches."""

from typing import Any

CACHES = ("past_key_values", "cache_params")


def self_attention_cache(cache: Any) -> Any:
    """Return the self-attention part of a cache."""
    return getattr(cache, "self_attention_cache", cache)


def fixed_size(cache: Any) -> int | None:
    """Return the capacity of a cache of fixed size in tokens, None for a growing one."""
    from transformers.cache_utils import StaticLayer

    sizes = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    return max(sizes, default=None)


def output_cache(output: Any) -> Any:
    """Return the cache in a model's output, if there is one."""
    from transformers import Cache

    for name in CACHES:
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if isinstance(part, Cache)), None)
