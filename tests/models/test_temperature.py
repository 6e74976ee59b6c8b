"""Where a method's temperature goes, and what is left of it."""

import math

import pytest
import torch
import zoo
from conftest import TRAINED, logits, relative, tiny_llama

from hf_rope_ext import RopeWarning, UnsupportedModelError, describe, patch_model, unpatch_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
SQUARED = (0.1 * math.log(4) + 1) ** 2


def test_into_the_logits_is_the_same_where_the_whole_head_rotates(llama, ids):
    patch_model(llama, "yarn", factor=4, temperature="logits")

    assert relative(logits(llama, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    assert llama.model.rotary_emb.attention_scaling == 1.0
    attention = llama.model.layers[0].self_attn
    assert attention.scaling == pytest.approx(16**-0.5 * SQUARED)
    unpatch_model(llama)
    assert attention.scaling == 16**-0.5


@pytest.mark.parametrize(
    ("model_type", "share"), [("glm4", 0.5), ("gpt_neox", 0.25), ("deepseek_v3", 0.5)]
)
def test_a_rotated_slice_gets_its_share_and_the_user_is_told(model_type, share):
    model = zoo.build(model_type)

    with pytest.warns(RopeWarning, match=r"by 1\.296.*temperature='logits'"):
        patch_model(model, "yarn", factor=4)

    (site,) = describe(model).sites
    rotated = site.rotary_dim / site.head_dim
    assert rotated == share
    assert site.logit_factor == pytest.approx(SQUARED)
    assert site.effective_logit_factor == pytest.approx(rotated * SQUARED + 1 - rotated)


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "nanochat", "llama4_text"])
def test_a_norm_after_rotation_cancels_it_and_the_user_is_told(model_type):
    model = zoo.build(model_type)
    inputs = zoo.inputs(model)

    with pytest.warns(RopeWarning, match=r"multiplies them by 1\.000"):
        patch_model(model, "yarn", factor=4)
    with_temperature = zoo.run(model, **inputs)
    patch_model(model, "ntk_by_parts", factor=4, replace=True)

    assert relative(zoo.run(model, **inputs), with_temperature) < 1e-3
    assert describe(model).sites[0].effective_logit_factor == 1.0


@pytest.mark.parametrize("model_type", ["glm4", "hunyuan_v1_dense", "deepseek_v3", "gemma3_text"])
def test_into_the_logits_reaches_them_in_full(model_type):
    model = zoo.build(model_type)
    expected = zoo.build(model_type)
    labels = {"layer_types": ["full_attention"]} if model_type == "gemma3_text" else {}
    patch_model(expected, "ntk_by_parts", factor=4, **labels)
    for path, module in expected.named_modules():
        if path.endswith("self_attn") and getattr(module, "is_sliding", False) is False:
            module.scaling *= SQUARED

    patch_model(model, "yarn", factor=4, temperature="logits", **labels)

    inputs = zoo.inputs(model)
    assert relative(zoo.run(model, **inputs), zoo.run(expected, **inputs)) < 1e-5


def test_a_family_without_a_softmax_scale_is_refused():
    model = zoo.build("falcon")

    with pytest.raises(UnsupportedModelError, match=r"no attention module .* softmax scale"):
        patch_model(model, "yarn", factor=4, temperature="logits")


# those that the installed transformers has
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "hy_v4_vl_text", "sarvam_mla"}


@pytest.mark.parametrize("model_type", sorted(LATENT & set(zoo.MODEL_TYPES)))
def test_latent_attention_scales_its_softmax_as_stock_does_when_it_is_built(model_type):
    mscale = {"mscale": 0.707, "mscale_all_dim": 1.0}
    stock = zoo.build(model_type, lambda rope: {**rope, **YARN, "factor": 40.0, **mscale})
    model = zoo.build(model_type)
    inputs = zoo.inputs(model)
    before = zoo.run(model, **inputs)

    with pytest.warns(RopeWarning):
        patch_model(model, "yarn", factor=40, **mscale)

    assert relative(zoo.run(model, **inputs), zoo.run(stock, **inputs)) < 1e-4
    unpatch_model(model)
    assert torch.equal(zoo.run(model, **inputs), before)


def test_replacing_takes_back_a_softmax_scale_that_was_built_in():
    mscale = {"mscale": 1.0, "mscale_all_dim": 1.0}
    model = zoo.build("deepseek_v3", lambda rope: {**rope, **YARN, **mscale})
    inputs = zoo.inputs(model)
    native = zoo.run(model, **inputs)

    patch_model(model, "linear", factor=4, replace=True)

    stock = zoo.build("deepseek_v3", lambda rope: {**rope, "rope_type": "linear", "factor": 4.0})
    assert relative(zoo.run(model, **inputs), zoo.run(stock, **inputs)) < 1e-4
    unpatch_model(model)
    assert torch.equal(zoo.run(model, **inputs), native)


def test_a_pair_of_mscales_gives_what_transformers_gives(llama, ids):
    pair = {"mscale": 1.0, "mscale_all_dim": 1.0}
    patch_model(llama, "yarn", factor=4, **pair)

    assert llama.model.rotary_emb.attention_scaling == 1.0
    assert relative(logits(llama, ids), logits(tiny_llama({**YARN, **pair}), ids)) < 1e-5


def test_an_explicit_factor_of_one_is_used_and_saved(llama):
    patch_model(llama, "yarn", factor=4, attention_factor=1.0)

    assert llama.model.rotary_emb.attention_scaling == 1.0
    assert llama.config.rope_parameters["attention_factor"] == 1.0


def test_a_key_that_transformers_never_reads_is_not_dropped_in_silence():
    model = tiny_llama({**YARN, "attn_factor": 1.0})

    with pytest.warns(RopeWarning, match=r"attn_factor=1\.0 is dropped"):
        patch_model(model, "yarn", factor=4, replace=True)


@pytest.mark.parametrize("kind", ["smollm3", "gemma3_text", "deepseek_v4"])
def test_into_the_logits_leaves_layers_alone_that_are_not_extended(kind):
    """Layers without RoPE, with a bounded window, and with other frequencies than the rest."""
    model = zoo.build(kind)
    attentions = [layer.self_attn for layer in model.model.layers]
    before = [attention.scaling for attention in attentions]

    patch_model(model, "yarn", factor=4, temperature="logits")

    extended = {"smollm3": [0], "gemma3_text": [1], "deepseek_v4": [1, 2]}[kind]
    for index, attention in enumerate(attentions):
        times = SQUARED if index in extended else 1.0
        assert attention.scaling == pytest.approx(before[index] * times), index
    unpatch_model(model)
    assert [attention.scaling for attention in attentions] == before


def test_a_label_of_a_layer_is_found_by_its_number_where_the_module_does_not_say():
    model = zoo.build("gemma3_text")
    for layer in model.model.layers:
        del layer.self_attn.layer_type
    before = [layer.self_attn.scaling for layer in model.model.layers]

    patch_model(model, "yarn", factor=4, temperature="logits")

    found = [layer.self_attn.scaling for layer in model.model.layers]
    assert found == [before[0], pytest.approx(before[1] * SQUARED)]


@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_a_built_in_softmax_scale_is_that_of_transformers(mscale):
    pair = {"mscale": 0.5, "mscale_all_dim": mscale}
    stock = zoo.build("deepseek_v3", lambda rope: {**rope, **YARN, **pair})
    model = zoo.build("deepseek_v3")

    with pytest.warns(RopeWarning):
        patch_model(model, "yarn", factor=4, **pair)

    expected = [layer.self_attn.scaling for layer in stock.model.layers]
    assert expected[0] > model.model.layers[0].self_attn.qk_head_dim ** -0.5
    found = [layer.self_attn.scaling for layer in model.model.layers]
    assert found == pytest.approx(expected, rel=1e-12)
