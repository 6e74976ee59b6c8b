"""Every family whose positions have axes: images, caches, legacy configs, and what is left alone.

Stock transformers is the oracle where it runs; else the textbook numbers written into a stock model
by hand (as in test_families), loops over pairs in float64, and decoding without a cache.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import zoo
import zoo_images
from conftest import relative
from test_checkpoint import KNOBS
from test_families import arguments, build_by_hand, build_stock, frequencies, pairs, slowdowns
from test_lengths import METHODS as PER_REQUEST
from test_lengths import methods as per_request
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaModel

from hf_rope_ext import (
    RopeError,
    available_methods,
    export,
    load_pretrained,
    patch_model,
    request_plan,
    unpatch_model,
)
from hf_rope_ext.families import find_rotaries
from hf_rope_ext.methods import make_method
from hf_rope_ext.rotary import ExtendedRotary
from hf_rope_ext.sites import read_sites

TRAINED = zoo.TRAINED
FAMILIES = sorted(zoo_images.FAMILIES)
GENERATING = [name for name in FAMILIES if name != "neomme"]  # an encoder
# their stock code takes no scaling
BY_HAND = {"cosmos3_edge", "ernie4_5_vl_moe"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning"),
    # stock: an image's grid of tensors is floored
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frequency_sets(model: nn.Module) -> Iterator[tuple[str | None, int, float, list[int]]]:
    """Layer type (or None), number of pairs, base and sections of each set of frequencies."""
    (rotary,) = find_rotaries(model)
    for label in rotary.labels:
        rope = rotary.parameters(label)
        count = rotary.live(label).shape[-1]
        yield label, count, float(rope["rope_theta"]), rope.get("mrope_section", [0, 0])


def knobs(name: str, count: int) -> dict[str, Any]:
    if name == "longrope":
        return {"factor": 4, "long_factor": slowdowns(count)}
    return KNOBS.get(name, {"factor": 4})


def cos_and_sin(model: nn.Module, positions: Tensor, label: str | None) -> tuple[Tensor, Tensor]:
    """What a patched model's rotary embedding returns."""
    (rotary,) = [part for part in model.modules() if isinstance(part, ExtendedRotary)]
    given = () if label is None else (label,)
    return rotary(torch.zeros(1, 1, 1), positions, *given)


# --- the layout of each family, pair by pair -----------------------------------------------------


def layout(model_type: str, section: list[int], width: int) -> list[tuple[int, int]]:
    """Pair and axis of every coordinate of cos and sin, as the families' papers and code say."""
    count = width // 2
    halves = [(coordinate % count) for coordinate in range(width)]
    neighbours = [coordinate // 2 for coordinate in range(width)]
    bounds = [sum(section[: axis + 1]) for axis in range(len(section))]
    if model_type == "hunyuan_vl":  # the sections are of coordinates, twice as wide
        return [
            (pair, next(axis for axis, end in enumerate(bounds) if coordinate < 2 * end))
            for coordinate, pair in enumerate(halves)
        ]
    if model_type == "neomme":  # rows and columns take turns
        return [(pair, pair % 2) for pair in halves]
    if model_type == "ernie4_5_vl_moe":  # height and width take turns, then time
        height, width_, _ = section
        return [(pair, 1 + pair % 2 if pair < height + width_ else 0) for pair in neighbours]
    chunked = {"qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v_moe"}
    glm = {"glm4v", "glm46v", "glm_ocr"}
    if model_type in chunked | glm | {"glm_image"}:
        axis_of = [
            next(axis for axis, end in enumerate(bounds) if pair < end) for pair in range(count)
        ]
        return [(pair, axis_of[pair]) for pair in (neighbours if model_type in glm else halves)]
    interleaved = [0] * count  # time, height and width take turns, as long as the latter last
    for axis in (1, 2):
        for pair in range(axis, min(3 * section[axis], count), 3):
            interleaved[pair] = axis
    return [(pair, interleaved[pair]) for pair in halves]


POSITIONS = torch.tensor([[3, 70, 99, 41], [5, 90, 12, 41], [7, 50, 64, 41], [11, 20, 33, 41]])
NATIVE = ("linear", "yarn", "llama3", "longrope", "dynamic")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_coordinate_turns_by_its_own_pair_and_axis(model_type):
    model = zoo.build(model_type)
    for label, count, base, section in frequency_sets(model):
        trained = base ** (-np.arange(0, 2 * count, 2) / (2 * count))
        turns_by = layout(model_type, section, 2 * count)
        positions = POSITIONS[: len(section), None, :]
        for name in NATIVE:
            labels = {} if label is None else {"layer_types": [label]}
            patch_model(model, name, **knobs(name, count), **labels)
            cos, sin = cos_and_sin(model, positions, label)
            unpatch_model(model)

            inv_freq, scaling = frequencies(name, base, trained)
            for found, function in ((cos[0], math.cos), (sin[0], math.sin)):
                for token in range(positions.shape[-1]):
                    for coordinate, (pair, axis) in enumerate(turns_by):
                        angle = int(positions[axis, 0, token]) * float(inv_freq[pair])
                        distance = float(found[token, coordinate]) - scaling * function(angle)
                        assert abs(distance) < 2e-5, (name, token, coordinate)


def plain_rope(count: int, base: float) -> nn.Module:
    """A Llama of the same pairs, base and trained length."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=2 * count,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2 * count,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    return LlamaModel(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_text_alone_is_one_dimensional_rope_bit_for_bit(model_type):
    model = zoo.build(model_type)
    # one row beyond the trained length and one within it
    ids = torch.stack((torch.arange(100), torch.arange(100) // 2))
    for label, count, base, section in frequency_sets(model):
        plain = plain_rope(count, base)
        pair_of = [pair for pair, _ in layout(model_type, section, 2 * count)]
        for name in available_methods():
            own = {**knobs(name, count), "probe": False}
            labels = {} if label is None else {"layer_types": [label]}
            patch_model(model, name, **own, **labels)
            patch_model(plain, name, **own)
            flat = cos_and_sin(model, ids, label)
            expanded = cos_and_sin(model, ids.expand(len(section), -1, -1), label)
            expected = cos_and_sin(plain, ids, None)
            unpatch_model(model)
            unpatch_model(plain)

            for one, other, reference in zip(flat, expanded, expected, strict=True):
                assert torch.equal(one, other), name
                assert torch.equal(one, reference[..., pair_of]), name


# --- images, against stock -----------------------------------------------------------------------

NEW = torch.randint(10, 128, (1, 4), generator=torch.Generator().manual_seed(5))


def kept(scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Scores of what is not padding."""
    return scores * inputs["attention_mask"].bool()[..., None]


def by_hand(model: nn.Module, inputs: dict[str, Any], new: Tensor = NEW) -> Tensor:
    """Scores of a loop written by hand, token by token behind a prompt."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        found = [out.logits[:, -1:]]
        for token in new.split(1, dim=1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, dim=1)


def write(model: nn.Module, inputs: dict[str, Any], new: int, **settings: Any) -> Any:
    """What `generate` writes greedily, and with what scores."""
    return model.generate(
        **inputs,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        suppress_tokens=zoo_images.SPECIAL,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def expected_model(model_type: str, method: str, count: int) -> nn.Module:
    if model_type in BY_HAND:
        return build_by_hand(model_type, method)
    stock = build_stock(model_type, method, count)
    assert stock is not None
    return stock


def others(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor but the frequencies of the text."""
    text = {f"{rotary.path}." for rotary in find_rotaries(model)}
    return {
        name: tensor.clone()
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]
        if not any(name.startswith(path) for path in text)
    }


@pytest.mark.parametrize("method", ["yarn", "linear", "llama3"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_patched_equals_stock_on_images(model_type, method, tmp_path):
    model = zoo.build(model_type)
    expected = expected_model(model_type, method, min(pairs(model)))
    batch = zoo_images.image_inputs(model, padded=True)
    single = zoo_images.image_inputs(model)
    trained, tensors = zoo.run(model, **batch), others(model)
    patch_model(model, method, **arguments(model, model_type))

    found = zoo.run(model, **batch)
    assert relative(kept(found, batch), kept(trained, batch)) > 0.05
    assert relative(kept(found, batch), kept(zoo.run(expected, **batch), batch)) < 1e-5
    if model_type in GENERATING:
        assert relative(by_hand(model, single), by_hand(expected, single)) < 1e-5
        sequences = [write(one, batch, 4).sequences for one in (model, expected)]
        assert torch.equal(*sequences)
    untouched = dict([*model.named_buffers(), *model.named_parameters()])
    assert all(torch.equal(untouched[name], tensor) for name, tensor in tensors.items())
    if method != "yarn":
        return

    before = zoo.text_config(zoo.build(model_type).config)
    model.save_pretrained(tmp_path)
    reloaded = (load_pretrained if model_type in BY_HAND else type(model).from_pretrained)(tmp_path)
    assert relative(zoo.run(reloaded.eval(), **batch), found) < 1e-5
    written = dict(export(model).config) if model_type not in BY_HAND else None
    for config in (model.config, reloaded.config):
        assert sections(zoo.text_config(config).rope_parameters) == sections(before.rope_parameters)
    if written is not None:
        for name in ("thinker_config", "text_config"):
            written = written.get(name, written)
        assert sections(written["rope_parameters"]) == sections(before.rope_parameters)


def sections(rope: dict[str, Any]) -> list[Any]:
    """What says how axes are laid out, by layer type where parameters are nested."""
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return [{key: own.get(key) for key in ("mrope_section", "mrope_interleaved")} for own in nested]
