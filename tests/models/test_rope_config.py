"""What is saved: stock transformers loads it and computes the same, silently."""

import json

import pytest
import torch
import zoo
from conftest import TRAINED, logits, relative, tiny_llama
from method_knobs import NOT_STOCK, knobs
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_rope_ext import (
    ExportError,
    RopeError,
    available_methods,
    export,
    load_pretrained,
    patch_model,
    save_pretrained,
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


def test_a_saved_adapter_brings_its_rope_along(ids, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    patched = patch_model(load_pretrained(tmp_path / "base"), "dynamic_yarn", factor=4)
    model = get_peft_model(
        patched, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    expected = logits(model, ids)

    save_pretrained(model, tmp_path / "adapter")
    loaded = load_pretrained(tmp_path / "adapter")

    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded, ids), expected)


def test_an_adapter_on_a_base_that_was_patched_otherwise_is_refused(tmp_path):
    for name, factor in (("base", 2), ("trained", 4)):
        patch_model(tiny_llama(), "yarn", factor=factor).save_pretrained(tmp_path / name)
    model = get_peft_model(
        load_pretrained(tmp_path / "trained"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    save_pretrained(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(tmp_path / "trained"), str(tmp_path / "base")))

    with pytest.raises(RopeError, match=r"method was .*4\.0.* in training and is .*2\.0"):
        load_pretrained(tmp_path / "adapter")


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
