"""What other engines are told, computed the way their own sources do."""

import json
import math

import numpy as np
import pytest
import torch
import zoo
from conftest import TRAINED, logits, relative, tiny_llama
from method_knobs import FREQUENCY_METHODS, NOT_STOCK, knobs
from transformers import AutoConfig, LlamaForCausalLM

from hf_rope_ext import ExportError, export, patch_model
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import make_method

GEOMETRY = RopeGeometry(16, 10000.0, TRAINED, 16)


def exported(name, to, **values):
    return export(patch_model(tiny_llama(), name, **values), to=to)


def flag(result, name):
    return result.flags[result.flags.index(name) + 1]


def test_transformers_gets_the_config_that_save_pretrained_writes(llama, ids):
    patch_model(llama, "yarn", factor=4)

    result = export(llama)
    assert (result.target, result.flags, result.notes) == ("transformers", (), ())
    changes = result.config
    config = tiny_llama().config
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    stock = LlamaForCausalLM(config).eval()

    assert changes["rope_parameters"] == llama.config.rope_parameters
    assert relative(logits(stock, ids), logits(llama, ids)) < 1e-5


def test_a_config_is_enough_to_export_from():
    result = export(tiny_llama().config, "vllm", method="linear", factor=4)

    assert result.config["rope_parameters"]["factor"] == 4.0
    assert flag(result, "--max-model-len") == "256"


def test_changes_of_a_vision_language_model_stand_in_its_text_config():
    model = zoo.build("qwen2_5_vl")

    with pytest.warns(UserWarning, match="advises against YaRN"):
        patch_model(model, "yarn", factor=4)
    changes = export(model).config

    assert list(changes) == ["text_config"]
    parameters = changes["text_config"]["rope_parameters"]
    assert parameters["rope_type"] == "yarn"
    assert parameters["mrope_section"] == model.config.text_config.rope_parameters["mrope_section"]


def vllm_cos_scale(parameters):
    """What vLLM multiplies cos and sin by, as its YaRN and LongRoPE modules do."""
    if parameters["rope_type"] == "longrope":
        return parameters["long_mscale"]
    return (0.1 * math.log(parameters["factor"]) + 1) * parameters.get("attn_factor", 1)


@pytest.mark.parametrize("to", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("yarn", {"factor": 4}),
        ("yarn", {"factor": 4, "attention_factor": 1.0}),
        ("yarn", {"factor": 4, "temperature_coefficient": 0.07}),
        ("ntk_by_parts", {"factor": 4}),
        ("ntk_mixed", {"factor": 4}),
        ("yarn+resonance", {"factor": 4}),
    ],
)
def test_engines_get_the_temperature_under_the_key_they_read(to, name, values):
    result = exported(name, to, **values)
    overrides = json.loads(result.flags[1])

    scale = vllm_cos_scale(overrides["rope_parameters"])

    assert result.flags[0] in ("--hf-overrides", "--json-model-override-args")
    plan = make_method(name, **values).plan(GEOMETRY)
    assert scale == pytest.approx(plan.attention_scaling, rel=1e-12)
    assert overrides["max_position_embeddings"] == 256


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_transformers_dynamic_is_not_what_engines_call_so(to):
    with pytest.raises(ExportError, match="one static base"):
        exported("dynamic", to, factor=4)


def test_yarn_on_an_m_rope_model_notes_the_range_that_vllm_takes():
    model = zoo.build("qwen3_vl")
    patch_model(model, "yarn", factor=2)

    assert "4 times the trained length" in export(model, "vllm").notes[0]


def test_what_an_engine_would_compute_without_the_sections_is_refused():
    model = zoo.build("qwen3_vl")
    patch_model(model, "linear", factor=2)

    with pytest.raises(ExportError, match="applies mrope_section only with"):
        export(model, "vllm")


def llama_cpp_frequencies(result):
    """The frequencies llama.cpp computes from its flags."""
    flags = dict(zip(result.flags[::2], result.flags[1::2], strict=True))
    base = float(flags.get("--rope-freq-base", 10000))
    trained = base ** (-np.arange(0, 16, 2) / 16)
    scale = 1 / float(flags.get("--rope-scale", 1))
    if flags.get("--rope-scaling") != "yarn":
        return trained * scale, 1.0
    original = int(flags["--yarn-orig-ctx"])
    turns = float(flags.get("--yarn-beta-fast", 32)), float(flags.get("--yarn-beta-slow", 1))
    low, high = (16 * math.log(original / (r * 2 * math.pi)) / (2 * math.log(base)) for r in turns)
    low, high = max(0.0, math.floor(low)), min(15.0, math.ceil(high))
    ramp = 1 - np.clip((np.arange(8) - low) / max(0.001, high - low), 0, 1)
    factor = float(flags.get("--yarn-attn-factor", 1)) * (1 + 0.1 * math.log(1 / scale))
    return trained * scale * (1 - ramp) + trained * ramp, factor


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("none", {}),
        ("linear", {"factor": 4}),
        ("ntk", {"factor": 4}),
        ("base", {"rope_theta": 1e6}),
        ("yarn", {"factor": 4}),
        ("yarn", {"factor": 2.7, "beta_fast": 8, "beta_slow": 2}),
        ("yarn", {"factor": 4, "attention_factor": 1.0}),
        ("ntk_by_parts", {"factor": 4}),
    ],
)
def test_llama_cpp_computes_the_plan_from_its_flags(name, values):
    result = exported(name, "llama.cpp", **values)
    plan = make_method(name, **values).plan(GEOMETRY)

    frequencies, factor = llama_cpp_frequencies(result)

    assert (result.target, result.config) == ("llama.cpp", {})
    np.testing.assert_allclose(frequencies, plan.inv_freq.numpy(), rtol=1e-12)
    assert factor == pytest.approx(plan.attention_scaling, rel=1e-12)
    assert int(flag(result, "--ctx-size")) == (
        make_method(name, **values).target_length(GEOMETRY) or TRAINED
    )


@pytest.mark.parametrize(
    "name", ["llama3", "ntk_mixed", "yarn+cope", "dynamic", "dynamic_yarn", "longrope"]
)
def test_llama_cpp_refuses_what_it_has_no_flags_for(name):
    values = {"factor": 4} | ({"long_factor": [4.0] * 8} if name == "longrope" else {})
    with pytest.raises(ExportError, match=r"llama\.cpp has no flags for"):
        exported(name, "llama.cpp", **values)


@pytest.mark.parametrize("to", ["transformers", "vllm", "sglang"])
@pytest.mark.parametrize("name", NOT_STOCK)
def test_a_plan_per_request_is_refused_or_frozen_when_asked(name, to, llama, ids):
    patch_model(llama, name, factor=4)
    with pytest.raises(ExportError, match="frozen=LENGTH"):
        export(llama, to)

    changes = export(llama, to, frozen=ids.shape[1]).config

    parameters = changes["rope_parameters"]
    parameters = {key: value for key, value in parameters.items() if not key.startswith("attn_")}
    stock = tiny_llama(parameters)
    assert relative(logits(stock, ids), logits(llama, ids)) < 1e-4


def test_every_static_method_has_a_form_for_transformers_and_vllm():
    for name in FREQUENCY_METHODS:
        if name.startswith("dynamic"):
            continue
        values = knobs(name) | ({"factor": 2} if name == "proportional" else {})
        for to in ("transformers", "vllm"):
            assert exported(name, to, **values).config["rope_parameters"]


def test_an_unknown_target_lists_the_known_ones(llama):
    with pytest.raises(ExportError, match=r"to must be one of 'transformers', .* got 'ollama'"):
        export(llama, "ollama")


def test_the_command_line_is_quoted_for_a_shell(llama):
    patch_model(llama, "yarn", factor=4)

    assert export(llama, "vllm").command_line.startswith("--hf-overrides '{\"max_position")


def test_a_saved_and_reloaded_config_of_the_export_is_the_config(tmp_path, llama):
    patch_model(llama, "ntk_mixed", factor=4)
    llama.config.save_pretrained(tmp_path)

    assert (
        AutoConfig.from_pretrained(tmp_path).rope_parameters
        == export(llama).config["rope_parameters"]
    )


@pytest.mark.parametrize("value", [None, 3, "a/model", {"model_type": "llama"}, torch.zeros(2)])
def test_what_is_neither_a_model_nor_a_config_is_refused(value):
    with pytest.raises(ExportError, match="takes a model or its config, got"):
        export(value, method="yarn", factor=4)


@pytest.mark.parametrize("frozen", [0, -1, "128", 2.0, True, 10**30])
def test_a_length_to_freeze_at_is_checked_whatever_the_method(frozen):
    for method in ("yarn", "dynamic_yarn"):
        with pytest.raises(ExportError, match="frozen must be an integer from 1"):
            export(patch_model(tiny_llama(), method, factor=4), frozen=frozen)


def test_a_patched_model_is_exported_as_it_is_and_not_by_another_method(llama):
    patch_model(llama, "yarn", factor=4)

    for arguments in ({"method": "linear"}, {"factor": 2}, {"method": "linear", "factor": 2}):
        with pytest.raises(ExportError, match=r"the model is patched with Yarn\(factor=4"):
            export(llama, **arguments)
    assert export(llama).config["rope_parameters"]["factor"] == 4.0


def test_a_vision_tower_has_no_setting_in_any_engine():
    model = zoo.build("qwen2_vl")
    vision = {"target": "vision", "original_max_position_embeddings": 8}
    for to in ("transformers", "vllm", "sglang", "llama.cpp"):
        with pytest.raises(ExportError, match="has no setting for the RoPE of a vision tower"):
            export(model, to, method="ntk", factor=2, **vision)
    patch_model(model, "ntk", factor=2, **vision)
    with pytest.raises(ExportError, match="has no setting for the RoPE of a vision tower"):
        export(model)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("base", {"rope_theta": 1e6, "target_length": 256}),
        ("none", {"limit_only": True, "target_length": 256}),
        ("yarn", {"limit_only": True, "factor": 4}),
        ("cope", {"target_length": 256}),
        ("yarn", {"target_length": 256}),
        ("none", {}),
    ],
)
def test_the_length_is_the_one_that_was_asked_for_whatever_the_method(method, arguments):
    """The oracle is what patching writes into the config."""
    model = patch_model(tiny_llama(), method, **arguments)
    limit = model.config.max_position_embeddings

    for source, more in ((model, {}), (tiny_llama().config, {"method": method, **arguments})):
        assert export(source, **more).config["max_position_embeddings"] == limit
        assert flag(export(source, "vllm", **more), "--max-model-len") == str(limit)
        assert flag(export(source, "sglang", **more), "--context-length") == str(limit)
    if method in ("none", "base", "yarn"):
        assert flag(export(model, "llama.cpp"), "--ctx-size") == str(limit)


def test_a_frozen_plan_has_the_length_it_was_frozen_at():
    model = patch_model(tiny_llama(), "dynamic_yarn", target_length=256)

    assert export(model, frozen=128).config["max_position_embeddings"] == 128


@pytest.mark.filterwarnings("ignore:.*sliding window:hf_rope_ext.errors.RopeWarning")
def test_an_encoder_and_its_decoder_each_get_their_own_length():
    config = zoo.config("t5gemma")
    config.encoder.max_position_embeddings, config.decoder.max_position_embeddings = 64, 128

    changes = export(config, method="linear", factor=4).config

    assert changes["encoder"]["max_position_embeddings"] == 256
    assert changes["decoder"]["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    "knobs", [{"ramp": "rotation"}, {"blend": "harmonic"}, {"truncate": False}]
)
def test_llama_cpp_has_no_flags_for_other_ramps(knobs):
    with pytest.raises(ExportError, match=r"llama\.cpp has no flags for yarn"):
        exported("yarn", "llama.cpp", factor=4, **knobs)


def test_llama_cpp_cannot_leave_pairs_unrotated():
    model = zoo.build("gemma4_text")

    for method in ("linear", "ntk", "yarn"):
        with pytest.raises(ExportError, match=r"unrotated pairs \(p-RoPE\)"):
            export(model, "llama.cpp", method=method, factor=4)
    assert export(model, "llama.cpp").flags[0] == "--ctx-size"


def test_each_deviation_of_llama_cpp_is_noted_and_nothing_else():
    def notes(**values):
        return [note.split()[0] for note in exported("yarn", "llama.cpp", factor=4, **values).notes]

    assert notes() == []
    assert notes(beta_fast=16) == ["--yarn-beta-fast"]
    assert notes(beta_slow=2) == ["--yarn-beta-slow"]
    assert notes(attention_factor=1.0) == ["--yarn-attn-factor"]


def test_vllm_notes_that_it_picks_one_list_and_engines_of_one_static_base_say_so():
    assert "selects one of longrope's lists" in exported("ntk_mixed", "vllm", factor=4).notes[0]
    assert exported("ntk_mixed", "sglang", factor=4).notes == ()
    assert exported("linear", "vllm", factor=4).notes == ()
    assert exported("yarn", "vllm", factor=4).notes == ()
