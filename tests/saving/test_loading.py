"""What is saved: stock transformers loads it and computes the same, silently."""

import json

import pytest
import torch
import zoo
from conftest import logits, relative, tiny_llama
from method_knobs import NOT_STOCK, knobs
from transformers import AutoModelForCausalLM

from hf_rope_ext import (
    ExportError,
    RopeError,
    available_methods,
    export,
    load_pretrained,
    patch_model,
    unpatch_model,
)

EXPRESSIBLE = [
    *((name, knobs(name)) for name in available_methods() if name not in NOT_STOCK),
    ("yarn", {"factor": 2.7}),  # not the ratio of two lengths
    ("yarn", {"factor": 4, "attention_factor": 1.0}),
    ("yarn", {"factor": 4, "truncate": False, "beta_fast": 16}),
    ("yarn", {"factor": 4, "blend": "harmonic"}),
    ("yarn", {"factor": 4, "temperature_coefficient": 0.07}),
    ("yarn", {"factor": 4, "mscale": 1.0, "mscale_all_dim": 0.5}),
    ("yarn+resonance", {"factor": 4}),
    ("ntk_by_parts", {"factor": 4, "ramp": "rotation"}),
    ("base+cope", {"rope_theta": 1e5, "hard_clip": True}),
    ("proportional", {"partial_rotary_factor": 0.5, "factor": 4}),
    ("giraffe", {"truncated_length": 32}),
    ("linear", {"factor": 1}),
    ("yarn", {"factor": 1}),
    ("llama3", {"factor": 1}),
]


@pytest.mark.parametrize(("name", "values"), EXPRESSIBLE)
def test_stock_loads_a_saved_model_without_a_word_and_computes_the_same(
    name, values, llama, ids, tmp_path, caught
):
    row = ids[:1]  # stock dynamic and longrope go by the longest row of a batch
    patch_model(llama, name, **values)
    expected = logits(llama, row)
    llama.save_pretrained(tmp_path)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert relative(logits(stock, row), expected) < 1e-4
    assert not caught


@pytest.mark.parametrize("name", [*available_methods(), "dynamic_yarn+resonance", "yarn+cope"])
def test_loading_restores_any_method_bit_for_bit(name, llama, ids, tmp_path, caught):
    patch_model(llama, name, **knobs(name))
    expected = logits(llama, ids)
    llama.save_pretrained(tmp_path)
    caught.clear()

    loaded = load_pretrained(tmp_path)

    assert torch.equal(logits(loaded, ids), expected)
    assert loaded.config.hf_rope_ext == llama.config.hf_rope_ext
    assert loaded.config.rope_parameters == llama.config.rope_parameters
    assert loaded.config.max_position_embeddings == llama.config.max_position_embeddings
    assert not caught
    unpatch_model(loaded)
    assert torch.equal(logits(loaded, ids), logits(tiny_llama(), ids))


@pytest.mark.parametrize("name", NOT_STOCK)
def test_a_stock_reader_stops_rather_than_run_an_unscaled_model(name, llama, tmp_path):
    patch_model(llama, name, factor=4)
    llama.save_pretrained(tmp_path)

    with pytest.raises(KeyError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_without_a_record_is_transformers_own(ids, tmp_path):
    model = tiny_llama({"rope_type": "linear", "factor": 2.0})
    model.save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model, ids))


def test_a_length_without_a_factor_is_restored_too(llama, tmp_path):
    patch_model(llama, "none", target_length=1000)
    llama.save_pretrained(tmp_path)

    assert load_pretrained(tmp_path).config.max_position_embeddings == 1000


def test_what_is_no_model_directory_is_one_clear_error(tmp_path):
    with pytest.raises(RopeError, match="is not a directory"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(RopeError, match="cannot read a model's config"):
        load_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(RopeError, match=r"no config\.json with a model_type"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(RopeError, match="cannot read a model's config"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RopeError, match=r"no config\.json with a model_type"):
        load_pretrained(tmp_path)


def test_a_record_of_a_newer_version_is_refused(llama, tmp_path):
    patch_model(llama, "yarn", factor=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["hf_rope_ext"]["version"] = 99
    path.write_text(json.dumps(settings))

    with pytest.raises(RopeError, match="does not know"):
        load_pretrained(tmp_path)


# a tiny one cannot be saved and loaded by stock transformers, patched or not
NOT_LOADED = {"gradium_phonon_tts", "shieldgemma2"}


# their config holds no RoPE that stock code reads: load_pretrained restores them
NO_PARAMETERS = {"codegen", "esm", "gptj", "roformer"}


# their stock code takes no scaling
DEFAULT_ONLY = {
    "cosmos3_edge",
    "cosmos3_edge_text",
    "ernie4_5_vl_moe",
    "ernie4_5_vl_moe_text",
    "recurrent_gemma",
}


# longrope, through which any set of frequencies goes, is refused where layers differ in width
LAYERS_DIFFER = {
    "diffusion_gemma",
    "diffusion_gemma_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_assistant",
    "gemma4_unified_text",
}


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize("name", ["yarn", "ntk_mixed"])
@pytest.mark.parametrize(
    "model_type", sorted(set(zoo.MODEL_TYPES) - NOT_LOADED - {"clvp", "clvp_encoder"})
)
def test_every_family_is_saved_so_that_stock_loads_it_or_says_that_it_cannot(
    name, model_type, tmp_path
):
    model = zoo.build(model_type)
    inputs = zoo.inputs(model, length=zoo.TRAINED - 4)
    unknown = model_type == "recurrent_gemma"  # its config does not say what length was trained
    patch_model(
        model,
        name,
        factor=4,
        original_max_position_embeddings=zoo.TRAINED if unknown else None,
    )
    expected = zoo.run(model, **inputs)
    model.save_pretrained(tmp_path)
    unreadable = (
        model_type in NO_PARAMETERS
        or (model_type in DEFAULT_ONLY and name != "ntk")
        or (model_type in LAYERS_DIFFER and name != "linear")
        or (model_type.startswith("embedding_gemma2") and name == "ntk_mixed")
    )

    if unreadable:
        with pytest.raises(ExportError):
            export(model)
        found = load_pretrained(tmp_path)
    else:
        assert export(model).config
        found = type(model).from_pretrained(tmp_path)

    assert relative(zoo.run(found, **inputs), expected) < 1e-3
