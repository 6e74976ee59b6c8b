"""Find the class that a saved model is loaded with."""

from collections.abc import Mapping
from typing import Any

from hf_rope_ext.errors import RopeError
from hf_rope_ext.models.family import Config

HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT's tasks whose model has another head than the checkpoint of its base."""


def find_class(config: Config, **kwargs: Any) -> tuple[Any, bool]:
    """Return the class to load a model of a config with, and whether it is the one that saved it.

    Args:
        config: The config.
        **kwargs: Arguments of ``from_pretrained``.

    Raises:
        RopeError: If transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    saved_by = getattr(config, "architectures", None) or ()
    remote = getattr(config, "auto_map", None) or {}
    if kwargs.get("trust_remote_code"):
        autos = [name for name in remote if name.startswith("AutoModel")]
        exact = [name for name in autos if remote[name].rpartition(".")[2] in saved_by]
        if autos:
            return getattr(transformers, (exact or autos)[0]), bool(exact)
    for name in saved_by:
        if hasattr(transformers, name):
            return getattr(transformers, name), True
    first = (
        # before others, since some composite configs are also mapped to the class of their text
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModel,
    )
    others = [own for name, own in vars(modeling_auto).items() if name.startswith("AutoModel")]
    known: list[Any] = []
    for auto in (*first, *others):
        mapped = getattr(auto, "_model_mapping", {}).get(type(config), None)
        known += mapped if isinstance(mapped, tuple | list) else [mapped] if mapped else []
    for one in known:
        if one.__name__ in saved_by:
            return one, True
    if not known:
        raise RopeError(
            f"transformers has no model for model_type={config.model_type!r}; pass model_class, or "
            f"trust_remote_code=True if its code comes with it."
        )
    return known[0], False


def class_of_base(settings: Mapping[str, Any]) -> Any:
    """Return the class that an adapter was trained on, as far as it says so."""
    import peft
    import transformers

    named = (settings.get("auto_mapping") or {}).get("base_model_class")
    task = settings.get("task_type")
    if task in HEADS:
        own = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
        for auto in vars(peft).values():
            if getattr(auto, "_target_peft_class", None) is own:
                return auto._target_class
    return getattr(transformers, named, None) if named else None
