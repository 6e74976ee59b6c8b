"""The config of a patched model, and of one that is to be patched."""

import json

import pytest
import torch
from conftest import TRAINED, logits, relative, tiny_llama
from method_knobs import knobs

from hf_rope_ext import (
    RopeError,
    load_pretrained,
    patch_model,
)


def test_static_ntk_is_saved_as_a_base_every_loader_understands(llama):
    patch_model(llama, "ntk", factor=4)

    parameters = llama.config.rope_parameters
    assert parameters["rope_type"] == "default"
    assert parameters["rope_theta"] == pytest.approx(10000 * 4 ** (16 / 14))


def test_the_published_base_of_a_128_wide_head():
    model = tiny_llama(head_dim=128)

    patch_model(model, "ntk", factor=4)

    assert model.config.rope_parameters["rope_theta"] == pytest.approx(40890, abs=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 4 * TRAINED),
        ("ntk", 4 * TRAINED),
        ("yarn", 4 * TRAINED),
        ("dynamic_yarn", 4 * TRAINED),
        ("dynamic", TRAINED),  # stock reads it as the length where growth begins
        ("none", TRAINED),
        ("base", TRAINED),
    ],
)
def test_the_configs_length_follows_a_rule_per_method(name, expected, llama):
    patch_model(llama, name, **knobs(name))

    assert llama.config.max_position_embeddings == expected


def test_lengths_are_written_as_integers_and_factors_as_floats(llama):
    patch_model(llama, "yarn", factor=4)

    parameters = llama.config.rope_parameters
    assert type(llama.config.max_position_embeddings) is int
    assert type(parameters["original_max_position_embeddings"]) is int
    assert type(parameters["factor"]) is float
    assert type(parameters["attention_factor"]) is float


def test_old_and_new_forms_of_a_config_are_patched_alike(tmp_path, ids):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path / "new")
    llama.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(settings | {"rope_scaling": None}))

    models = [load_pretrained(tmp_path / form) for form in ("old", "new")]
    for model in models:
        patch_model(model, "yarn", factor=4)

    assert torch.equal(*(model.model.rotary_emb.inv_freq for model in models))
    assert torch.equal(*(logits(model, ids) for model in models))


@pytest.mark.parametrize(
    "spelling",
    [
        {"type": "default"},
        {"rope_type": "default"},
        {"type": "default", "rope_type": "default"},
        {"type": "mrope", "rope_type": "default"},
    ],
)
def test_any_spelling_of_unscaled_counts_as_unscaled(spelling, ids):
    model = tiny_llama()
    model.config.rope_parameters = {"rope_theta": 10000.0, **spelling}

    patch_model(model, "yarn", factor=4)

    expected = logits(patch_model(tiny_llama(), "yarn", factor=4), ids)
    assert torch.equal(logits(model, ids), expected)


def test_two_types_that_disagree_are_both_shown(llama):
    llama.config.rope_parameters = {"rope_theta": 1e4, "type": "linear", "rope_type": "yarn"}

    with pytest.raises(RopeError, match="type='linear' and rope_type='yarn'"):
        patch_model(llama, "yarn", factor=4)


def test_a_base_that_the_config_has_lost_is_recovered_from_the_live_frequencies(ids):
    model = tiny_llama({"rope_theta": 500000.0})
    del model.config.rope_parameters["rope_theta"]

    patch_model(model, "linear", factor=4)

    stock = tiny_llama({"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0})
    assert relative(logits(model, ids), logits(stock, ids)) < 1e-5
    assert model.config.rope_parameters["rope_theta"] == 500000.0


def test_a_base_that_is_nowhere_is_never_guessed(llama):
    del llama.config.rope_parameters["rope_theta"]
    llama.model.rotary_emb.inv_freq.zero_()

    with pytest.raises(RopeError, match=r"no rope_theta .* cannot be recovered"):
        patch_model(llama, "linear", factor=4)


def test_a_scaling_set_after_loading_is_told_to_have_no_effect(llama):
    llama.config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}

    with pytest.raises(RopeError, match="set after loading, so it has no effect"):
        patch_model(llama, "yarn", factor=4)
