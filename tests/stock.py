"""What a patched model must equal: stock transformers, or a model written by hand."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import relative
from method_knobs import slowdowns
from torch import Tensor, nn

from hf_rope_ext import UnsupportedModelError, patch_model, unpatch_model
from hf_rope_ext.models.find import find_rotaries

TRAINED, FACTOR, LENGTH = zoo.TRAINED, 4.0, 100
STEPS = 6
NATIVE: dict[str, dict[str, Any]] = {
    "linear": {"factor": FACTOR},
    "yarn": {"factor": FACTOR, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": FACTOR,
        "original_max_position_embeddings": TRAINED,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": FACTOR,
        "original_max_position_embeddings": TRAINED,
    },
    "dynamic": {"factor": FACTOR},
}
REFUSED = {"clvp", "clvp_encoder"}

# keys and the queries that meet them are rotated in calls that see different positions, so a plan
# per request has no one length (described in hf_rope_ext.patches)
NO_LENGTH = {
    "deepseek_v4", "diffusion_gemma", "gemma4_unified_assistant", "muse_glimmer_assistant", "pi0",
}  # fmt: skip

# their config does not say what length was trained
LENGTH_NOT_IN_CONFIG = {"recurrent_gemma"}

# generate raises in stock transformers on these tiny models: no generate, several codebooks, a
# speech input, another package
NO_GENERATE = {
    "clvp",
    "gemma4_unified_assistant",
    "gradium_phonon_tts",
    "higgs_audio_v2",
    "kyutai_speech_to_text",
    "pocket_tts",
    "vibevoice",
    "voxtral_realtime",
}

# a deep random model that amplifies the difference of float32 and float64 frequencies; with
# float64 frequencies in the stock module the difference is 0
AMPLIFIES = {"dia": 1e-3}


def arguments(model: nn.Module, model_type: str) -> dict[str, Any]:
    """Call arguments that serve every layer type, as the stock model that it is compared with."""
    labels = dict.fromkeys(label for rotary in find_rotaries(model) for label in rotary.labels)
    chosen: dict[str, Any] = {"factor": FACTOR}
    if None not in labels:
        chosen["layer_types"] = list(labels)
    if model_type in LENGTH_NOT_IN_CONFIG:
        chosen["original_max_position_embeddings"] = TRAINED
    return chosen


def pairs(model: nn.Module) -> set[int]:
    return {
        rotary.live(label).shape[-1] for rotary in find_rotaries(model) for label in rotary.labels
    }


def build_stock(model_type: str, rope_type: str, count: int) -> nn.Module | None:
    """The natively scaled model, None where stock refuses or crashes on it."""
    scaling = {"rope_type": rope_type, **NATIVE[rope_type]}
    if rope_type == "longrope":
        scaling |= {"short_factor": [1.0] * count, "long_factor": slowdowns(count)}
    try:
        model = zoo.build(model_type, lambda rope: {**rope, **scaling})
        zoo.run(model, **zoo.inputs(model, length=4))
    except Exception:
        return None
    return model


def frequencies(rope_type: str, base: float, trained: np.ndarray) -> tuple[np.ndarray, float]:
    """The textbook formula, pair by pair, and what cos and sin are multiplied by."""
    dim = 2 * len(trained)
    turns = TRAINED * trained / (2 * np.pi)
    if rope_type == "linear":
        return trained / FACTOR, 1.0
    if rope_type == "llama3":
        smooth = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
        return (1 - smooth) * trained / FACTOR + smooth * trained, 1.0
    if rope_type == "yarn":
        low, high = (
            dim * math.log(TRAINED / (r * 2 * math.pi)) / (2 * math.log(base)) for r in (32, 1)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return trained / FACTOR * ramp + trained * (1 - ramp), 0.1 * math.log(FACTOR) + 1
    if rope_type == "longrope":
        temperature = math.sqrt(1 + math.log(FACTOR) / math.log(TRAINED))
        return trained / np.array(slowdowns(dim // 2)), temperature
    multiplier = FACTOR * LENGTH / TRAINED - (FACTOR - 1)
    return trained * multiplier ** (-np.arange(0, dim, 2) / (dim - 2)), 1.0


def build_by_hand(model_type: str, rope_type: str) -> nn.Module:
    """An unscaled stock model whose buffers hold the textbook numbers."""
    model = zoo.build(model_type)
    for rotary in find_rotaries(model):
        for label in rotary.labels:
            parameters = rotary.parameters(label)
            base = float(parameters.get("rope_theta", 10000.0))
            live = rotary.live(label)
            count = live.shape[-1]
            trained = base ** (-np.arange(0, 2 * count, 2) / (2 * count))
            order = list(range(count))
            if model_type.startswith("ernie4_5_vl"):
                height, width, _ = parameters["mrope_section"]
                order = [
                    *range(0, height + width, 2),
                    *range(1, height + width, 2),
                    *range(height + width, count),
                ]
            resting = live.numpy()[np.argsort(order)] == 0
            planned, scaling = frequencies(rope_type, base, np.where(resting, 0.0, trained))
            write(rotary, label, torch.from_numpy(planned[order]), scaling)
    return model


def write(rotary: Any, label: str | None, planned: Tensor, scaling: float) -> None:
    """Put numbers where the stock code reads them."""
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * planned
    rows = (torch.cat((angles.sin(), angles.cos()), dim=1) * scaling).float()
    original, prefix = rotary.original, "" if label is None else f"{label}_"
    if isinstance(original, Tensor):
        rotary.parent.register_buffer(rotary.name, rows, persistent=False)
    elif isinstance(original, nn.Embedding):
        original.weight = nn.Parameter(rows, requires_grad=False)
    elif hasattr(original, "rope_init_fn"):
        original.rope_init_fn = lambda config: (planned.float(), scaling)
    else:
        getattr(original, f"{prefix}inv_freq").copy_(planned)
        setattr(original, f"{prefix}attention_scaling", scaling)


def follows_length(stock: nn.Module) -> bool:
    """Whether a stock model is told its length; Qwen2-VL's was not in transformers 5.16."""
    return all(
        hasattr(type(rotary.original).forward, "__wrapped__")  # by `dynamic_rope_update`
        for rotary in find_rotaries(stock)
        if isinstance(rotary.original, nn.Module)
    )


def expected_model(model_type: str, rope_type: str, count: int) -> tuple[nn.Module, str]:
    """What a patched model must equal, and how it was made."""
    stock = build_stock(model_type, rope_type, count)
    # stock phimoe computes its frequencies from the short list whatever the length
    wrong = (model_type, rope_type) == ("phimoe", "longrope") or (
        rope_type in ("dynamic", "longrope") and stock is not None and not follows_length(stock)
    )
    if stock is not None and not wrong:
        return stock, "stock"
    return build_by_hand(model_type, rope_type), "by hand"


def decode(model: nn.Module, **settings: Any) -> Tensor:
    """Greedy decoding, with a cache by default, across the trained length."""
    inputs = zoo.inputs(model, length=TRAINED - STEPS // 2)
    torch.manual_seed(0)  # diffusion draws noise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **settings)
    return getattr(found, "sequences", found)


def check(model_type: str) -> dict[str, str]:
    """Compare every native type with stock, or by hand where stock refuses; return which."""
    model = zoo.build(model_type)
    inputs = zoo.inputs(model, length=LENGTH)
    fixed = model_type in zoo.FIXED_TABLE  # stock cannot run beyond its table
    before = None if fixed else zoo.run(model, **inputs)
    chosen, counts = arguments(model, model_type), pairs(model)
    bound = AMPLIFIES.get(model_type, 1e-4)
    how = {}
    for rope_type in NATIVE:
        if rope_type == "longrope" and len(counts) > 1:
            continue  # one list does not fit layer types of different widths
        if rope_type in ("dynamic", "longrope") and model_type in NO_LENGTH:
            with pytest.raises(UnsupportedModelError, match=r"positions of (one|the) request"):
                patch_model(model, "dynamic", **chosen)
            continue
        lists = {"long_factor": slowdowns(*counts)} if rope_type == "longrope" else {}
        expected, how[rope_type] = expected_model(model_type, rope_type, min(counts))
        patch_model(model, rope_type, **chosen, **lists)
        found = zoo.run(model, **inputs)
        assert relative(found, zoo.run(expected, **inputs)) < bound, rope_type
        if rope_type == "yarn" and model.can_generate() and model_type not in NO_GENERATE:
            # stock Phi drops its cache on the way, before transformers 5.20 for good
            cache = {"use_cache": False} if model_type.startswith("phi") else {}
            assert torch.equal(decode(model), decode(expected, **cache))
        unpatch_model(model)
        if before is not None:
            assert relative(found, before) > 2e-4, rope_type
            assert torch.equal(zoo.run(model, **inputs), before), rope_type
    return how
