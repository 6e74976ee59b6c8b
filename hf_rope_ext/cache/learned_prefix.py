"""Virtual tokens that PEFT puts before a prompt: learned embeddings, or a cache of learned keys.

Learned keys are not rotated, so any plan may continue them. They are marked where PEFT makes them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_rope_ext.changes import Change, StandIn
from hf_rope_ext.models import host
from hf_rope_ext.rotary.running import Generation

_PASSED = "hf_rope_ext_cache"


class MarkPrefix(StandIn):
    """Stands in for the method of a PeftModel that makes its virtual tokens."""

    name = "get_prompt"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make them."""
        return _mark(self.stock(*args, **kwargs))


def prefix_changes(model: nn.Module) -> list[Change]:
    """Return the changes by which the prefixes of adapters in a model are known."""
    return [
        MarkPrefix(part).change()
        for part in model.modules()
        if hasattr(type(part), MarkPrefix.name) and MarkPrefix.name not in vars(part)
    ]


def is_learned(cache: Any) -> bool:
    """Return whether a cache holds nothing but a learned prefix."""
    return getattr(host.self_attention_cache(cache), "hf_rope_ext_prefix", 0) == int(
        cache.get_seq_length()
    )


@contextmanager
def prompt_learning(model: Any, generation: Generation) -> Iterator[None]:
    """Let PEFT and the installed transformers agree on the cache while ``generate`` runs.

    During ``generate`` a PeftModel puts its own preparation of inputs on the base model. It looks
    for the cache by its name before transformers 5.24 only, and so would add its virtual tokens in
    every step.

    Args:
        model: The model that generates.
        generation: Its call of ``generate``, which is told of the virtual tokens.
    """
    prepare = vars(model).get(host.PREPARE_INPUTS)
    adapter = getattr(prepare, "__self__", None)
    settings: Any = getattr(adapter, "active_peft_config", None)
    if adapter is None or not getattr(settings, "is_prompt_learning", False):
        yield
        return
    name = host.cache_argument(type(model).forward)
    stock = adapter.base_model_prepare_inputs_for_generation

    def prepare_base(*args: Any, **kwargs: Any) -> Any:
        prepared = dict(stock(*args, **kwargs))
        cache = host.given_cache(prepared)
        if prepared.get("use_cache") is False:
            # the model returns the prefix that it was given, grown; each step gets a new one
            cache = prepared[name] = None
        is_filled = cache is not None and int(cache.get_seq_length())
        return {**prepared, host.PEFT_CACHE: cache if is_filled else None, _PASSED: cache}

    def prepare_all(*args: Any, **kwargs: Any) -> Mapping[str, Any]:
        prepared = prepare(*args, **kwargs)
        if prepared.get("position_ids") is None:
            # PEFT drops the positions behind learned embeddings, and the model counts columns
            generation.lengths = None
        passed, cache = prepared.pop(_PASSED), prepared.pop(host.PEFT_CACHE)
        if cache is not None and cache is not passed:
            _mark(cache)
        return {**prepared, name: passed if cache is None else cache}

    adapter.base_model_prepare_inputs_for_generation = prepare_base
    setattr(model, host.PREPARE_INPUTS, prepare_all)
    generation.virtual_tokens = settings.num_virtual_tokens
    try:
        yield
    finally:
        adapter.base_model_prepare_inputs_for_generation = stock
        setattr(model, host.PREPARE_INPUTS, prepare)


def _mark(prompt: Any) -> Any:
    if host.is_cache(prompt):
        own = host.self_attention_cache(prompt)
        own.hf_rope_ext_prefix = int(own.get_seq_length())
    return prompt
