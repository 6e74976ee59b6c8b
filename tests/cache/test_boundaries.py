"""Requests in which what mostly agrees does not: axes, windows, and notes of what was before."""

import pytest
import torch
import zoo
from conftest import relative
from decoding import CACHE, dynamic, frozen, step_by_step, text, vision_language_inputs
from transformers import MistralConfig, MistralForCausalLM, StaticCache

from hf_rope_ext import patch_model, planned, request_plan

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_row_is_as_long_as_its_largest_position_on_any_axis(axis, cached):
    ids = text(2, 12)
    positions = torch.arange(12).repeat(3, 2, 1)
    positions[axis, 0, 7] = 200  # beyond the trained length, and not the last token
    positions[axis, 1, 11] = 90
    model = dynamic(model=zoo.build("qwen2_vl"))
    with torch.no_grad():
        out = model(ids, position_ids=positions, use_cache=cached)

    for row, length in enumerate((201, 91)):
        twin = frozen("dynamic_yarn", length, zoo.build("qwen2_vl"))
        with torch.no_grad():
            expected = twin(ids[row : row + 1], position_ids=positions[:, row : row + 1]).logits
        assert relative(out.logits[row : row + 1], expected) < 1e-5
    if cached:
        assert request_plan(out).lengths.tolist() == [201, 91]


def windowed_mistral():
    """A model that rotates in a window of 24 tokens, far less than its trained 64 positions."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=24,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).eval()


def test_a_windowed_cache_is_turned_by_the_positions_of_the_tokens_it_still_holds():
    _, grown = step_by_step(dynamic(model=windowed_mistral()), ids := text(1, 102), 100)
    capacity = int(request_plan(grown).lengths)
    with planned(capacity):
        _, expected = step_by_step(dynamic(model=windowed_mistral()), ids, 100)

    assert capacity > 102
    held, wanted = grown.layers[0].keys, expected.layers[0].keys
    assert held.shape[-2] == 23
    assert relative(held, wanted) < 1e-5


@pytest.mark.parametrize("method", ["none", "dynamic_yarn"])
def test_a_cache_that_was_reset_keeps_no_note_of_the_image_it_held(method):
    model = zoo.build("qwen2_vl")
    inputs = vision_language_inputs(model, words=6)
    ids = text(1, 20)  # within the trained length, where nothing is scaled
    expected = zoo.build("qwen2_vl")
    patch_model(model, method, **({} if method == "none" else {"factor": 4}))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=48)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        assert model.model.rope_deltas.any()
        cache.reset()
        found = [model(part, **{CACHE: cache}).logits for part in ids.split(10, dim=1)]

        assert relative(torch.cat(found, dim=1), expected(ids).logits) < 1e-5
