"""What is saved: stock transformers loads it and computes the same, silently."""

import copy
import json
import re

import pytest
import stock
import torch
import zoo
import zoo_images
from conftest import CORE_TYPES, logits, relative, tiny_llama
from finetuning import write_model
from method_knobs import FREQUENCY_METHODS, NOT_STOCK, knobs
from transformers import AutoModelForCausalLM

from hf_rope_ext import (
    ExportError,
    RopeError,
    VisualPositions,
    available_methods,
    export,
    load_pretrained,
    patch_model,
    unpatch_model,
)
from hf_rope_ext.saving.configs import SavedConfig, read_config
from hf_rope_ext.saving.loading import load_processor, load_unpatched, skeleton

EXPRESSIBLE = [
    *((name, knobs(name)) for name in FREQUENCY_METHODS if name not in NOT_STOCK),
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


REMEDY = r"load this model with hf_rope_ext\.load_pretrained"


@pytest.mark.parametrize(("name", "values"), EXPRESSIBLE)
def test_stock_loads_a_saved_model_without_a_word_and_computes_the_same(
    name, values, llama, ids, tmp_path, caught
):
    row = ids[:1]  # stock dynamic and longrope go by the longest row of a batch
    patch_model(llama, name, **values)
    expected = logits(llama, row)
    llama.save_pretrained(tmp_path)

    found = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert relative(logits(found, row), expected) < 1e-4
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

    with pytest.raises(ValueError, match=f"{name}.*{REMEDY}"):
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


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama"])
def test_bounds_that_are_not_rounded_stay_so_in_every_layer_type(model_type, tmp_path):
    """Stock code reads `truncate` where the parameters are flat, and not by layer type."""
    rounded, exact = zoo.build(model_type), zoo.build(model_type)
    inputs = zoo.inputs(exact, length=100)
    patch_model(rounded, "yarn", factor=4)
    patch_model(exact, "yarn", factor=4, truncate=False)
    expected = zoo.run(exact, **inputs)
    assert relative(zoo.run(rounded, **inputs), expected) > 1e-2
    exact.save_pretrained(tmp_path)

    found = type(exact).from_pretrained(tmp_path)

    assert relative(zoo.run(found, **inputs), expected) < 1e-4


# a tiny one cannot be saved and loaded by stock transformers, patched or not
NOT_LOADED = {"gradium_phonon_tts", "shieldgemma2"}
# one of each kind of config, and those of the core suite
KINDS = {
    "codegen", "esm", "gptj", "roformer",  # no RoPE that stock code reads
    "cosmos3_edge", "ernie4_5_vl_moe", "recurrent_gemma",  # no scaling that it knows
    "phi3", "phi4_multimodal",  # a validator that refuses other types
    "embedding_gemma2", "gemma4_text",  # layers that differ in width
    "gemma3", "qwen2_5_vl", "t5gemma",  # by layer type, inside a whole model, in two towers
}  # fmt: skip
TYPES = sorted(set(zoo.MODEL_TYPES) - NOT_LOADED - stock.REFUSED)


def stopped(load):
    """Whether stock code stops with the remedy; any other error passes through."""
    try:
        load()
    except Exception as error:
        if re.search(REMEDY, str(error)) is None:
            raise
        return True
    return False


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize("name", ["yarn", "ntk_mixed", "dynamic_yarn"])
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(own, marks=[] if own in {*KINDS, *CORE_TYPES} else [pytest.mark.slow])
        for own in TYPES
    ],
)
def test_every_family_is_saved_so_that_stock_loads_it_or_says_that_it_cannot(
    name, model_type, tmp_path
):
    if name == "dynamic_yarn" and model_type in stock.NO_LENGTH:
        return
    model = zoo.build(model_type)
    inputs = zoo.inputs(model, length=zoo.TRAINED + 36)
    unknown = model_type in stock.LENGTH_NOT_IN_CONFIG
    trained = zoo.TRAINED if unknown else None
    patch_model(model, name, factor=4, original_max_position_embeddings=trained)
    expected = zoo.run(model, **inputs)
    model.save_pretrained(tmp_path)

    if stopped(lambda: type(model).from_pretrained(tmp_path)):
        assert stopped(lambda: type(model)(type(model.config).from_dict(model.config.to_dict())))
        with pytest.raises(ExportError):
            export(model)
    else:
        found = type(model).from_pretrained(tmp_path)
        assert relative(zoo.run(found, **inputs), expected) < 1e-3
        assert export(model).config

    assert torch.equal(zoo.run(load_pretrained(tmp_path), **inputs), expected)


def test_a_config_that_stops_stock_code_is_as_it_was_once_unpatched():
    model = zoo.build("cosmos3_edge")
    before = copy.deepcopy(vars(model.config)), copy.deepcopy(vars(zoo.text_config(model.config)))

    patch_model(model, "dynamic_yarn", factor=4)
    assert vars(model.config) != before[0]
    unpatch_model(model)

    assert (vars(model.config), vars(zoo.text_config(model.config))) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": "abc"}, r"is not valid: .*'max_position_embeddings'"),
        (
            {"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}},
            r"'llama' config.*banana",
        ),
    ],
)
def test_a_config_that_describes_no_model_is_an_error_of_this_package(tmp_path, changes, message):
    settings = {**tiny_llama().config.to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RopeError, match=message):
        skeleton(read_config(tmp_path)[0])


SECTIONS = {"mrope_section": [2, 3, 3]}


@pytest.mark.parametrize("depth", [("text_config",), ("thinker_config", "text_config")])
@pytest.mark.parametrize(
    ("text", "beside", "expected"),
    [
        ({"rope_scaling": {"type": "mrope"}, "rope_theta": 5.0}, {}, {"rope_theta": 5.0}),
        ({}, {"rope_scaling": {"type": "mrope"}, "rope_theta": 5.0}, {"rope_theta": 5.0}),
        (
            {"rope_theta": 7.0},  # the text's own goes before what stands beside it
            {"rope_scaling": {"type": "mrope"}, "rope_theta": 5.0, "partial_rotary_factor": 0.5},
            {"rope_theta": 7.0, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_m_rope_as_older_checkpoints_say_it_is_found_in_the_text_config(
    text, beside, expected, depth
):
    text, beside = copy.deepcopy((text, beside))
    for place in (text, beside):
        place.get("rope_scaling", {}).update(SECTIONS)
    settings = {depth[-1]: text, **beside}
    for name in depth[-2::-1]:
        settings = {name: settings}

    found = SavedConfig.from_settings({"model_type": "any", **settings}, "the config")

    inner = found.settings
    for name in depth:
        inner = inner[name]
    assert not found.as_found
    assert found.record is None
    assert inner == {"rope_scaling": {"rope_type": "default", **SECTIONS}, **expected}
    again = SavedConfig.from_settings(copy.deepcopy(found.settings), "the config")
    assert again.as_found


def test_a_model_is_loaded_as_before_its_patch_with_its_tokenizer(tmp_path):
    write_model(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    patched = AutoModelForCausalLM.from_pretrained(tmp_path)
    patch_model(patched, "dynamic_yarn", factor=4).save_pretrained(tmp_path)

    model, tokenizer = load_unpatched(tmp_path, device="cpu", dtype="float64")

    ids = torch.tensor([tokenizer("a text of some words, " * 5)["input_ids"]])
    assert torch.equal(logits(model, ids), logits(stock.double(), ids))
    for dtype in ("int8", "float33", "nn"):
        with pytest.raises(RopeError, match=f"dtype must be float32, .* got '{dtype}'"):
            load_unpatched(tmp_path, device="cpu", dtype=dtype)
    (tmp_path / "model.safetensors").write_text("spoilt")
    with pytest.raises(RopeError, match=r"cannot load .*header"):
        load_unpatched(tmp_path, device="cpu", dtype="float32")


def test_a_model_without_a_processor_takes_no_images(tmp_path):
    with pytest.raises(RopeError, match=r"cannot load a processor from .*: Unrecognized"):
        load_processor(tmp_path)
    with pytest.raises(RopeError, match="has no processor, so it takes no images"):
        load_processor(write_model(tmp_path))


def test_both_towers_and_the_places_of_images_come_back(tmp_path):
    model = zoo.build("qwen2_vl")
    inputs = zoo_images.image_inputs(model)
    stock = zoo.run(model, **inputs)
    rule = VisualPositions(factor={"t": 4, "w": 2})
    patch_model(model, "dynamic_linear", factor=4, visual_positions=rule)
    text_alone = zoo.run(model, **inputs)
    patch_model(
        model, "linear", factor=2, target="vision", original_max_position_embeddings=zoo.TRAINED
    )
    expected = zoo.run(model, **inputs)
    assert relative(text_alone, stock) > 1e-4
    assert relative(expected, text_alone) > 1e-4
    model.save_pretrained(tmp_path)

    found = load_pretrained(tmp_path)

    assert torch.equal(zoo.run(found, **inputs), expected)
    unpatch_model(found, "vision")
    assert torch.equal(zoo.run(found, **inputs), text_alone)
    unpatch_model(found)
    assert torch.equal(zoo.run(found, **inputs), stock)
