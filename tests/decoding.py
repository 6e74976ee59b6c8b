"""Requests to length-dependent methods, and the static twin that each must equal.

The twin has the static method that a request of the planned length gets, and decodes without a
cache; it is checked against stock transformers elsewhere.
"""

import inspect

import torch
from conftest import tiny_llama
from method_knobs import knobs
from transformers import LlamaForCausalLM

from hf_rope_ext import patch_model
from hf_rope_ext.methods import make_method
from hf_rope_ext.models.sites import read_sites

CACHE = next(
    name
    for name in inspect.signature(LlamaForCausalLM.forward).parameters
    if name in ("cache", "past_key_values")
)
"""What the installed transformers calls a cache."""

FAMILIES = (
    "llama", "gemma3_text", "gpt_neox", "cohere", "deepseek_v3", "gpt_oss", "qwen3", "qwen2_vl",
    "phi3", "glm4", "mistral", "gptj", "falcon_h1", "llama4_text", "qwen3_next",
)  # fmt: skip


def text(rows, length, seed=1):
    return torch.randint(10, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def dynamic(method="dynamic_yarn", model=None, **settings):
    model = tiny_llama() if model is None else model
    return patch_model(model, method, **{**knobs(method), **settings})


def frozen(method, length, model=None, **own):
    """The model with the static method that a request of ``length`` gets."""
    model = tiny_llama() if model is None else model
    geometry = read_sites(model)[0].geometry
    made = make_method(method, **{**knobs(method), **own})
    return patch_model(model, made.freeze(geometry, length))


def greedy(model, ids, new, **arguments):
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **arguments)


def step_by_step(model, ids, prompt, cache=None):
    """Logits of a loop written by hand, and its cache."""
    found = []
    for first, last in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
        with torch.no_grad():
            out = model(ids[:, first:last], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        found.append(out.logits)
    return torch.cat(found, dim=1), cache


def vision_language_inputs(model, words):
    """A prompt of text around an image, which takes fewer positions than tokens."""
    model.config.image_token_id = model.model.config.image_token_id = 9
    kinds = torch.tensor([[0] * 4 + [1] * 16 + [0] * words])
    ids = torch.where(kinds == 1, 9, text(1, kinds.shape[1]))
    pixels = torch.randn(64, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
