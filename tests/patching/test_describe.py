"""`describe` reports what computes, not what a config says."""

import json
import math

import pytest
import torch
import zoo
from conftest import TRAINED, tiny_llama
from decoding import CACHE, dynamic, greedy, text

from hf_rope_ext import UnsupportedModelError, describe, patch_model, unpatch_model


def test_it_reports_the_method_and_its_numbers(llama):
    patch_model(llama, "yarn", factor=4)

    found = describe(llama)
    (site,) = found.sites

    assert found.method["name"] == "yarn"
    assert found.factor == 4.0
    assert found.modules == 1
    assert found.max_position_embeddings == 4 * TRAINED
    assert site.path == "model.rotary_emb"
    assert site.base == 10000.0
    assert site.original_max_position_embeddings == TRAINED
    assert site.attention_scaling == pytest.approx(1.138629, abs=1e-6)
    assert site.logit_factor == pytest.approx(1.296477, abs=1e-5)
    assert site.largest_slowdown == pytest.approx(4.0, rel=1e-6)
    assert site.sound


def test_an_unpatched_model_is_described_too(llama):
    found = describe(llama)

    assert found.method is None
    assert found.sites[0].scaling == "default"
    assert found.sites[0].untouched_pairs == found.sites[0].pairs == 8


def test_a_models_own_scaling_is_described(llama):
    model = tiny_llama(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
    )

    (site,) = describe(model).sites

    assert site.scaling == "yarn"
    assert site.attention_scaling == pytest.approx(1.138629, abs=1e-6)
    assert site.largest_slowdown == pytest.approx(4.0, rel=1e-5)


def test_it_reads_live_buffers_and_not_the_config(llama):
    patch_model(llama, "linear", factor=4)
    llama.model.rotary_emb.inv_freq.mul_(2)

    (site,) = describe(llama).sites

    assert not site.sound
    assert site.largest_slowdown == pytest.approx(2.0, rel=1e-6)
    assert "NOT THE PLAN" in str(describe(llama))


def test_a_plan_per_request_is_described_at_its_far_end(llama):
    patch_model(llama, "dynamic_yarn", factor=4)

    (site,) = describe(llama).sites

    assert site.scaling == "dynamic_yarn (follows the request)"
    assert site.largest_slowdown == pytest.approx(4.0, rel=1e-6)
    assert site.attention_scaling == pytest.approx(1.138629, abs=1e-6)
    assert site.sound


def test_pairs_at_rest_are_named_so(llama):
    patch_model(llama, "cope", hard_clip=True)

    assert describe(llama).sites[0].largest_slowdown is None
    assert "at rest" in str(describe(llama))


def test_it_is_json_data_and_a_table(llama):
    patch_model(llama, "yarn+resonance", factor=4)

    found = describe(llama)

    assert json.loads(json.dumps(found.to_dict()))["method"]["name"] == "yarn+resonance"
    assert "yarn+resonance" in str(found)
    assert "model.rotary_emb" in str(found)


def test_every_number_of_a_site_stands_in_its_row(llama):
    patch_model(llama, "yarn", factor=4)

    lines = str(describe(llama)).splitlines()

    (row,) = [line for line in lines if "model.rotary_emb" in line]
    # of 8 pairs YaRN's ramp begins at the first and ends at the third
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "model.rotary_emb", "yarn", "10000", "16/16", "64", "1 of 8", "/ 4", "x 1.139",
        "x 1.296 of 1.296", "float32 cpu ok",
    ]  # fmt: skip
    assert f"max_position_embeddings {4 * TRAINED}" in lines


def test_a_temperature_for_the_logits_is_not_in_the_rotation(llama):
    patch_model(llama, "yarn", factor=4, temperature="logits")

    (site,) = describe(llama).sites

    assert site.attention_scaling == 1.0
    assert site.logit_factor == site.effective_logit_factor == pytest.approx(1.296477, abs=1e-5)


def test_it_says_what_a_request_is_planned_for():
    model = dynamic()
    found = greedy(model, text(1, 100), 28, return_dict_in_generate=True)

    site = describe(model, found[CACHE]).sites[0]

    assert site.attention_scaling == pytest.approx(0.1 * math.log(2) + 1)
    assert describe(model).sites[0].attention_scaling > site.attention_scaling


def test_every_module_of_several_is_described():
    found = describe(zoo.build("t5gemma"))

    assert [site.path for site in found.sites] == [
        "model.encoder.rotary_emb",
        "model.decoder.rotary_emb",
    ]
    assert found.modules == 2


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize(
    "model_type", ["gemma3", "gptj", "roformer", "phimoe", "ernie4_5_vl_moe", "deepseek_v2"]
)
def test_what_it_says_of_every_kind_of_layout_is_sound(model_type):
    model = zoo.build(model_type)
    assert all(site.sound for site in describe(model).sites)

    patch_model(model, "yarn", factor=4)

    assert all(site.sound for site in describe(model).sites)
    assert {round(site.attention_scaling, 5) for site in describe(model).sites} == {1.13863}
    unpatch_model(model)
    assert all(site.sound for site in describe(model).sites)


def test_a_model_without_rope_is_refused():
    with pytest.raises(UnsupportedModelError):
        describe(torch.nn.Linear(2, 2))
