"""Tiny models for drawn requests: patched, unpatched, and with the frequencies of one length.

Attention is sharp and the trained length short, so that a plan for one position more or less moves
the logits by far more than rounding does. The twin that says what is right is a stock model into
whose rotary buffers the static frequencies of a length are written: no code that plans requests
has a part in it.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from method_knobs import PER_REQUEST, knobs
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_rope_ext import RequestPlan, patch_model
from hf_rope_ext.methods import DynamicLinear, DynamicYarn, Method, PerAxis, make_method
from hf_rope_ext.models.sites import RopeSite, read_sites
from hf_rope_ext.rotary.axes import read_axes

TRAINED = 16
"""Trained length of every model, in positions."""
IMAGE, VIDEO, START, END = 6, 7, 5, 9  # as `zoo` configures its models
SPECIAL = [*range(3, 10)]  # tokens that no text holds, and `generate` shall not write
WORDS = range(10, 60)
LLAVA_TOKENS = 4
VIRTUAL = 11
"""Learned tokens that an adapter puts before a prompt."""

_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def _llama_config(layers: int = 2, trained: int = TRAINED, **settings: Any) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    known = {"max_position_embeddings": trained, "rope_parameters": rope}
    return LlamaConfig(**_SIZES, num_hidden_layers=layers, **known, **settings)


def _gemma3() -> nn.Module:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SIZES, **layers, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
            max_position_embeddings=TRAINED, rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
                "full_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        )
    )  # fmt: skip


def _windowed() -> nn.Module:
    """One rotary embedding for layers with a window and without; its config names no 16."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    return Qwen2ForCausalLM(
        Qwen2Config(
            **_SIZES, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
            use_sliding_window=True, sliding_window=6, max_position_embeddings=50,
            rope_parameters=rope,
        )
    )  # fmt: skip


def _gptj() -> nn.Module:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return GPTJForCausalLM(
        GPTJConfig(**sizes, **tokens, n_positions=100, n_inner=32, initializer_range=0.3)
    )


def _llava() -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=32, initializer_range=0.3,
    )  # fmt: skip
    towers = {"vision_config": vision, "text_config": _llama_config(layers=1)}
    model = LlavaForConditionalGeneration(
        LlavaConfig(**towers, image_token_index=IMAGE, vision_feature_layer=-1)
    )
    model.generation_config.eos_token_id = None
    return model


def _adapted(kind: str) -> nn.Module:
    """Llama behind learned tokens, which are as large as what the model makes of words."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    configs = {
        "prompt tuning": functools.partial(PromptTuningConfig),
        "p-tuning": functools.partial(PromptEncoderConfig, encoder_hidden_size=16),
        "prefix tuning": PrefixTuningConfig,
    }
    model = LlamaForCausalLM(_llama_config())
    config = configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own in adapted.prompt_encoder.parameters():
            own.copy_(torch.randn(own.shape, generator=generator) * 0.3)
    return adapted


def _from_zoo(model_type: str) -> nn.Module:
    model = zoo.build(model_type)
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Kind:
    """A tiny model.

    Args:
        make: Builds it, unpatched, with weights that depend on the seed alone.
        layers: Number of its layers. With one alone, rotating cached keys to a longer plan is
            exact, since what it caches depends on no other layer.
        images: ``"grid"`` where an image takes positions along rows and columns, ``"tokens"`` where
            each of its tokens takes one; None where it takes no images.
        video: ``"whole"`` where a video is one span of tokens, ``"frames"`` where each frame is
            one; None where it is shown no videos.
        interval: Positions between the frames of a video that is one span.
        same_token: Whether frames are written with the token of images, so that a prompt holds
            either.
        head: What it says: ``"tokens"`` for scores of every token, ``"pooled"`` for one row of
            scores.
        windowed: Whether a layer forgets what is behind its window.
        virtual: Number of learned tokens before every prompt.
        counts_columns: Whether positions are those of columns, padding included, whatever is
            passed: PEFT ignores positions where its learned tokens are embeddings.
    """

    make: Callable[[], nn.Module]
    layers: int = 2
    images: str | None = None
    video: str | None = None
    interval: int = 1
    same_token: bool = False
    head: str = "tokens"
    windowed: bool = False
    virtual: int = 0
    counts_columns: bool = False

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return self.make().eval()


KINDS = {
    "llama": Kind(lambda: LlamaForCausalLM(_llama_config())),
    "llama of one layer": Kind(lambda: LlamaForCausalLM(_llama_config(layers=1)), layers=1),
    "gemma3": Kind(_gemma3, windowed=True),
    "qwen2 with a window": Kind(_windowed, windowed=True),
    "gptj": Kind(_gptj),
    "classifier": Kind(
        lambda: LlamaForSequenceClassification(_llama_config(num_labels=5)), head="pooled"
    ),
    "qwen2_vl": Kind(lambda: _from_zoo("qwen2_vl"), images="grid", video="whole"),
    "qwen2_5_vl": Kind(lambda: _from_zoo("qwen2_5_vl"), images="grid", video="whole", interval=4),
    "qwen3_vl": Kind(lambda: _from_zoo("qwen3_vl"), images="grid", video="frames"),
    "glm4v": Kind(lambda: _from_zoo("glm4v"), images="grid", video="frames", same_token=True),
    "llava": Kind(_llava, layers=1, images="tokens"),
    # a rotary embedding in each layer
    "recurrent_gemma": Kind(lambda: _from_zoo("recurrent_gemma")),
    "t5gemma": Kind(lambda: _from_zoo("t5gemma"), head="none"),
    **{
        name: Kind(functools.partial(_adapted, name), virtual=VIRTUAL, counts_columns=are_columns)
        for name, are_columns in {
            "prompt tuning": True,
            "p-tuning": True,
            "prefix tuning": False,
        }.items()
    },
}
TEXT = ("llama", "llama of one layer", "gemma3", "qwen2 with a window", "gptj")
IMAGES = tuple(name for name, kind in KINDS.items() if kind.images)
LEARNED = tuple(name for name, kind in KINDS.items() if kind.virtual)

BY_AXIS = "dynamic by axis"
METHODS = PER_REQUEST


def method_of(name: str, pairs: int) -> Method:
    """The method, with no temperature within the trained length."""
    if name == BY_AXIS:
        return PerAxis({"t": DynamicYarn(4.0), "w": DynamicLinear(2.0)})
    more = {"attention_factor": 1.0} if name == "longrope" else {}
    return make_method(name, **knobs(name, pairs), **more)


@dataclass(frozen=True, eq=False)
class Patched:
    """A patched model, and the plans that it has told of."""

    model: nn.Module
    plans: list[RequestPlan]


@functools.cache
def patched(kind: str, method: str, on_growth: str = "rerotate") -> Patched:
    model = KINDS[kind].build()
    plans: list[RequestPlan] = []
    pairs = read_sites(model)[0].geometry.pairs
    patch_model(
        model,
        method_of(method, pairs),
        original_max_position_embeddings=TRAINED,
        on_growth=on_growth,
        on_plan=plans.append,
    )
    return Patched(model, plans)


@functools.cache
def stock(kind: str) -> nn.Module:
    return KINDS[kind].build()


class Twin:
    """A stock model that can be given the static frequencies of any length."""

    def __init__(self, kind: str) -> None:
        self.kind = KINDS[kind]
        self.model = self.kind.build()
        self.sites = [
            read_axes(site)
            for site in read_sites(self.model, original_max_position_embeddings=TRAINED)
            if site.label is None or "sliding" not in site.label
        ]

    def set_length(self, method: str, length: int) -> nn.Module:
        """Plan the model for a length, and forget what its earlier calls left on it."""
        for site in self.sites:
            self.write(site, method, length)
        for part in self.model.modules():
            if getattr(part, "rope_deltas", None) is not None:
                part.rope_deltas = None
        return self.model

    def write(self, site: RopeSite, method: str, length: int) -> None:
        """Plan one of its rotary embeddings for a length."""
        own = method_of(method, site.geometry.pairs).freeze(site.geometry, length)
        _write(site, own.plan(site.geometry))


def _write(site: RopeSite, plan: Any) -> None:
    rotary = site.rotary.original
    if isinstance(rotary, Tensor):  # GPT-J's table of sines and cosines
        angles = torch.arange(len(rotary), dtype=torch.float64)[:, None] * plan.inv_freq
        both = torch.cat((angles.sin(), angles.cos()), dim=1) * float(plan.attention_scaling)
        rotary.copy_(both)
        return
    prefix = "" if site.label is None else f"{site.label}_"
    getattr(rotary, f"{prefix}inv_freq").copy_(plan.inv_freq)
    setattr(rotary, f"{prefix}attention_scaling", float(plan.attention_scaling))


@functools.cache
def twin(kind: str) -> Twin:
    return Twin(kind)


def forget() -> None:
    """Drop the patched models, so that one failure does not make the next."""
    patched.cache_clear()
