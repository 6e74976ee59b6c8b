"""The config of a patched model, and of one that is to be patched."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import TRAINED, logits, relative, tiny_llama
from method_knobs import knobs, stock_plan
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from hf_rope_ext import ExportError, RopeError, export, load_pretrained, patch_model
from hf_rope_ext.geometry import FrequencyPlan, RopeGeometry
from hf_rope_ext.methods import METHODS, make_method
from hf_rope_ext.models.rope_config import longrope_parameters, unscaled_parameters
from hf_rope_ext.models.sites import read_sites
from hf_rope_ext.rotary.installed import patch_of


def test_static_ntk_is_saved_as_a_base_every_loader_understands(llama):
    patch_model(llama, "ntk", factor=4)

    parameters = llama.config.rope_parameters
    assert parameters["rope_type"] == "default"
    assert parameters["rope_theta"] == pytest.approx(10000 * 4 ** (16 / 14))


# as transformers' configs have them, and as older ones and this package had them
TRAINING = {"rope_theta", "rope_type", "partial_rotary_factor", "mrope_section"}
SCALING = [
    *sorted(set(RopeParameters.__annotations__) - TRAINING),
    *("alpha", "attn_factor", "edited", "long_mscale", "short_mscale", "type"),
]


@pytest.mark.parametrize("key", [*SCALING, "mrope_section", "partial_rotary_factor", "unknown"])
def test_a_scaling_that_is_replaced_leaves_no_key_and_what_is_trained_stays(key, llama):
    (site,) = read_sites(llama)
    scaled = replace(site, rope_scaling={"rope_type": "yarn", "rope_theta": 3.0, key: 7})

    expected = {"rope_type": "default", "rope_theta": 10000.0}
    if key not in SCALING:
        expected[key] = 7
    assert unscaled_parameters(scaled) == expected
    keeping = replace(
        scaled, rotary=replace(site.rotary, family=replace(site.family, keeps=(key,)))
    )
    assert unscaled_parameters(keeping)[key] == 7


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize(
    "method",
    [
        make_method(name, **knobs(name))
        for name in METHODS
        if not make_method(name, **knobs(name)).length_dependent
    ],
    ids=lambda method: method.name,
)
def test_any_static_plan_is_a_longrope_of_transformers(method, temperature):
    geometry = RopeGeometry(16, 1e4, TRAINED, 16)
    plan = replace(method.plan(geometry), attention_scaling=temperature)
    written = longrope_parameters(geometry, plan, 4 * TRAINED)

    for length in (1, TRAINED, TRAINED + 1, 4 * TRAINED):
        found, scaling = stock_plan(geometry, written, length)
        torch.testing.assert_close(found, plan.inv_freq.float(), rtol=2e-6, atol=1e-29)
        assert scaling == temperature
    assert written["factor"] == 4.0
    assert {**written, "short_factor": 0, "long_factor": 0} == {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": 0,
        "long_factor": 0,
        "attention_factor": temperature,
    }
    for target in (None, TRAINED, TRAINED // 2):
        assert longrope_parameters(geometry, plan, target)["factor"] == 1.0


def test_a_slowdown_is_written_to_14_digits_and_rest_as_a_large_one():
    geometry = RopeGeometry(8, 1e4, TRAINED, rotated_pairs=3)
    plan = FrequencyPlan(geometry.inv_freq() / 3)

    assert longrope_parameters(geometry, plan, None)["long_factor"] == [3.0, 3.0, 3.0, 1e30]


@pytest.mark.parametrize("target", [None, 200])
def test_the_record_holds_the_patch_and_what_was_there_before(llama, target):
    chosen = {"factor": 4} if target is None else {"target_length": target}
    patch_model(llama, "linear", **chosen)

    assert llama.config.hf_rope_ext == {
        "version": 1,
        "method": {"name": "linear", "factor": 4.0 if target is None else target / TRAINED},
        "original_max_position_embeddings": TRAINED,
        "temperature": "rotation",
        "target_length": target,
        "layer_types": None,
        "unscaled": {
            "max_position_embeddings": TRAINED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    assert llama.config.max_position_embeddings == (target or 4 * TRAINED)
    assert llama.config.rope_parameters["rope_type"] == "linear"


def test_layers_that_are_not_extended_keep_their_parameters():
    model = zoo.build("gemma3_text")
    before = copy.deepcopy(model.config.rope_parameters)

    patch_model(model, "linear", factor=4)

    full = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0}
    assert model.config.rope_parameters == {**before, "full_attention": full}
    unscaled = model.config.hf_rope_ext["unscaled"]
    assert unscaled["rope_parameters"] == before


def test_a_form_of_a_layer_type_says_nothing_that_stock_reads_elsewhere():
    """transformers reads `truncate` from the outer dict alone."""
    model = zoo.build("gemma3_text")
    patch_model(model, "yarn", factor=4, truncate=False)
    (rotary,) = patch_of(model).rotaries.values()

    form = model.config.rope_parameters["full_attention"]
    assert form["rope_type"] == "longrope"
    found, scaling = ROPE_INIT_FUNCTIONS["longrope"](
        model.config, "cpu", seq_len=256, layer_type="full_attention"
    )
    torch.testing.assert_close(found, rotary.full_attention_inv_freq, rtol=2e-6, atol=0)
    assert scaling == rotary.full_attention_attention_scaling


def test_a_temperature_for_the_logits_has_a_stock_form_where_the_whole_head_rotates(llama):
    patch_model(llama, "yarn", factor=4, temperature="logits")
    assert llama.config.rope_parameters["rope_type"] == "yarn"
    for model_type in ("glm4", "hunyuan_v1_dense"):
        model = zoo.build(model_type)
        patch_model(model, "yarn", factor=4, temperature="logits")
        assert model.config.rope_parameters["rope_type"].startswith("hf_rope_ext.yarn")
        with pytest.raises(ExportError, match="transformers has no key for it"):
            export(model)
        patch_model(model, "linear", factor=4, temperature="logits", replace=True)
        assert model.config.rope_parameters["rope_type"] == "linear"


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


# a family for each rule of stock code, how a method is written for it (None: so that it stops), and
# what stock code needs besides
WRITTEN = [
    ("llama", "dynamic", "dynamic", {}),
    ("phi3", "ntk", "default", {}),  # knows few types, and has a length beside the parameters
    ("phi3", "yarn", "longrope", {"original_max_position_embeddings": TRAINED}),
    ("phi3", "dynamic", None, {}),
    ("phimoe", "yarn", "longrope", {}),  # reads temperatures under other names
    ("lfm3", "none", "proportional", {}),  # pairs at rest
    ("lfm3", "ntk_mixed", "longrope", {}),
    ("gemma4_text", "linear", "proportional", {}),  # the same, with layers of two widths
    ("gemma4_text", "yarn", None, {}),
    ("granite_swa", "ntk", "longrope", {}),  # a base that other layers share
    ("mistral4", "none", "linear", {}),  # knows no default
    ("cosmos3_edge", "ntk", "default", {}),  # knows nothing else
    ("cosmos3_edge", "linear", None, {}),
    ("mixtral", "ntk", "default", {}),  # leaves the width of a head open
    ("mixtral", "yarn", "yarn", {"head_dim": 16}),
    ("qwen3_vl", "linear", "linear", {}),  # sections, which a validator warns about
    ("gpt_neox", "yarn", "yarn", {}),  # part of a head, whose width is no entry
    ("gptj", "yarn", None, {}),
]


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize(("stack", "name", "written", "beside"), WRITTEN)
def test_what_is_written_for_a_kind_of_family_is_what_stock_computes(
    stack, name, written, beside, caught
):
    model = zoo.build(stack)
    inputs, weights = zoo.inputs(model, length=100), copy.deepcopy(model.state_dict())
    before = zoo.text_config(model.config).to_dict()
    caught.clear()

    patch_model(model, name, **knobs(name))

    assert not any("rope" in line for line in caught)
    after = zoo.text_config(model.config).to_dict()
    changed = {key for key in after if after[key] != before.get(key)}
    own = {"hf_rope_ext", "max_position_embeddings", "n_positions", "rope_parameters"}
    settings = type(model.config).from_dict(model.config.to_dict())
    if written is None:
        with pytest.raises(Exception, match=r"load this model with hf_rope_ext\.load_pretrained"):
            type(model)(settings)
        assert changed <= own | {"experts_implementation"}
        return
    rope = after["rope_parameters"]
    assert rope.get("full_attention", rope)["rope_type"] == written
    assert {key: after[key] for key in changed - own} == {
        key: value for key, value in beside.items() if before[key] != value
    }
    stock = type(model)(settings).eval()
    stock.load_state_dict(weights)
    assert relative(zoo.run(stock, **inputs), zoo.run(model, **inputs)) < 1e-4


@pytest.mark.parametrize(("name", "kept"), [("ntk", TRAINED), ("yarn", TRAINED // 2)])
def test_a_length_beside_the_parameters_is_changed_where_stock_computes_with_it(name, kept):
    model = zoo.build("phi3")
    patch_model(model, name, factor=4, original_max_position_embeddings=TRAINED // 2)

    assert model.config.original_max_position_embeddings == kept


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
