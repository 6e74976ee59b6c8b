"""Vision-language models: the text's RoPE is extended, sections and vision are as they were."""

import warnings

import pytest
import torch
import zoo
from conftest import relative
from method_knobs import FACTOR_ONLY
from transformers import AutoConfig

from hf_rope_ext import RopeError, RopeWarning, export, load_pretrained, patch_model, request_length

M_ROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")


@pytest.mark.parametrize("model_type", M_ROPE)
def test_lengths_and_sections_stand_in_the_text_config_in_memory_and_saved(model_type, tmp_path):
    model = zoo.build(model_type)
    before = dict(model.config.text_config.rope_parameters)

    patch_model(model, "yarn", factor=2)
    model.save_pretrained(tmp_path)

    saved = AutoConfig.from_pretrained(tmp_path).text_config
    for config in (model.config.text_config, saved):
        assert config.max_position_embeddings == 2 * zoo.TRAINED
        assert config.rope_parameters["rope_type"] == "yarn"
        for key in ("mrope_section", "mrope_interleaved", "rope_theta"):
            assert config.rope_parameters.get(key) == before.get(key)
    assert "rope_parameters" not in model.config.__dict__
    assert export(model).config["text_config"]["rope_parameters"] == saved.rope_parameters


@pytest.mark.parametrize("model_type", M_ROPE)
@pytest.mark.parametrize("method", FACTOR_ONLY)
def test_distinct_positions_turn_each_pair_by_its_own_axis(model_type, method):
    model = zoo.build(model_type)
    text = model.model.language_model
    section = zoo.text_config(model.config).rope_parameters["mrope_section"]
    patch_model(model, method, factor=4)
    positions = torch.tensor([[[3, 70, 200]], [[5, 90, 100]], [[7, 50, 150]]])
    rotation = text.rotary_emb.rotations[None]
    plan = rotation.method.freeze(rotation.geometry, 201).plan(rotation.geometry)

    cos, _ = text.rotary_emb(torch.zeros(1, 3, 1), positions)

    pairs = rotation.geometry.pairs
    interleaved = model_type.startswith("qwen3")
    expected = torch.zeros(3, pairs, dtype=torch.float64)
    for pair in range(pairs):
        axis = axis_of(pair, section, interleaved=interleaved)
        for token in range(3):
            angle = int(positions[axis, 0, token]) * float(plan.inv_freq[pair])
            expected[token, pair] = torch.tensor(angle, dtype=torch.float64).cos()
    expected *= float(plan.attention_scaling)
    found = cos[0, :, ::2] if model_type == "glm4v" else cos[0, :, :pairs]
    torch.testing.assert_close(found[:, :pairs].double(), expected, rtol=0, atol=1e-4)


def axis_of(pair, section, *, interleaved):
    """The axis of a pair: chunks of t, h, w in turn, or t, h, w taking turns."""
    if interleaved:
        for axis in (1, 2):
            if pair % 3 == axis and pair < 3 * section[axis]:
                return axis
        return 0
    end = 0
    for axis, size in enumerate(section):
        end += size
        if pair < end:
            return axis
    raise AssertionError(pair)


@pytest.mark.parametrize("model_type", M_ROPE)
def test_text_alone_is_plain_rope(model_type):
    model = zoo.build(model_type)
    patch_model(model, "yarn", factor=4)
    rotary = model.model.language_model.rotary_emb
    positions = torch.arange(200)[None]

    flat = rotary(torch.zeros(1, 200, 1), positions)
    three = rotary(torch.zeros(1, 200, 1), positions.expand(3, 1, -1))

    assert all(torch.equal(one, other) for one, other in zip(flat, three, strict=True))


def test_a_saved_vision_language_model_is_restored(tmp_path):
    model = zoo.build("qwen2_5_vl")
    patch_model(model, "dynamic_yarn", factor=4)
    inputs = zoo.inputs(model)
    expected = zoo.run(model, **inputs)

    model.save_pretrained(tmp_path)

    assert relative(zoo.run(load_pretrained(tmp_path), **inputs), expected) == 0.0


def test_qwen_2_5s_card_is_cited_and_the_length_alone_can_be_raised():
    model = zoo.build("qwen2_5_vl")
    inputs = zoo.inputs(model)
    before = zoo.run(model, **inputs)

    with pytest.warns(RopeWarning, match="advises against YaRN.*limit_only=True"):
        patch_model(model, "yarn", factor=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, "yarn", target_length=1000, limit_only=True, replace=True)

    assert model.config.text_config.max_position_embeddings == 1000
    assert torch.equal(zoo.run(model, **inputs), before)


def test_qwen3s_cards_are_cited():
    model = zoo.build("qwen3_vl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, "yarn", factor=3)
    with pytest.warns(RopeWarning, match="a factor of 2 or 3"):
        patch_model(model, "yarn", factor=4, replace=True)

    text = zoo.build("qwen3")
    text.config.max_position_embeddings = 40960
    with pytest.warns(RopeWarning, match=r"taken to be 40960.*32768"):
        patch_model(text, "yarn", factor=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(text, "yarn", factor=4, original_max_position_embeddings=32768, replace=True)
    assert text.config.max_position_embeddings == 131072


def test_a_request_is_measured_in_positions():
    model = zoo.build("qwen2_vl")
    # 4 tokens of text, an image of 8 x 8 patches that 16 tokens stand for, 4 of text
    kinds = torch.tensor([[0] * 4 + [1] * 16 + [0] * 4])
    ids = torch.where(kinds == 1, model.config.image_token_id, 5)
    grid = torch.tensor([[1, 8, 8]])

    found = request_length(
        model, input_ids=ids, mm_token_type_ids=kinds, image_grid_thw=grid, pixel_values=None
    )

    # the image takes max(8, 8) / 2 positions
    assert (found.tokens, found.positions) == (24, 12)
    assert found.factor == 1.0
    long = torch.full((1, 100), 5)
    patch_model(model, "linear", factor=2)
    assert request_length(model, input_ids=long).factor == 100 / zoo.TRAINED


def test_padding_is_not_measured():
    model = zoo.build("llama")
    mask = torch.tensor([[0] * 60 + [1] * 40, [1] * 100])

    found = request_length(model, input_ids=torch.zeros(1, 100).long(), attention_mask=mask[:1])

    assert found.positions == 40
    with pytest.raises(RopeError, match="input_ids must be a tensor"):
        request_length(model, input_ids=[1, 2])
