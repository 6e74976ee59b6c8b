"""What `inspect` and `plan` say, against real caches and counted angles."""

import math

import pytest
import torch
import zoo
from conftest import tiny_llama
from decoding import CACHE
from transformers import LlamaConfig

from hf_rope_ext import RopeError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import Dynamic, Linear, NoScaling, Yarn, make_method
from hf_rope_ext.planning.extension import (
    cache_bytes,
    curves,
    decay,
    effect,
    inspect_config,
    plan_extension,
    text_site,
)

LLAMA2 = RopeGeometry(128, 1e4, 4096, 128)


def test_pairs_that_never_finish_a_turn_are_counted():
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=4096)

    (found,) = inspect_config(config)

    assert found.rope_theta == 10000.0
    assert found.wavelengths[0] == pytest.approx(2 * math.pi)
    assert found.wavelengths[-1] == pytest.approx(2 * math.pi * 10000 ** (126 / 128))
    assert found.unfinished_pairs == sum(length > 4096 for length in found.wavelengths) == 18


def test_every_layer_type_and_a_configs_own_scaling_are_shown():
    found = inspect_config(zoo.config("gpt_oss"))
    assert [one.layer_type for one in found] == [None]

    nested = inspect_config(zoo.config("gemma3_text"))
    assert [one.layer_type for one in nested] == ["full_attention"]

    scaled = tiny_llama({"rope_type": "linear", "factor": 2.0}).config
    (one,) = inspect_config(scaled)
    assert one.scaling["rope_type"] == "linear"
    assert one.original_max_position_embeddings == 0


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gpt_oss", "mixtral", "phi3"])
@pytest.mark.parametrize("length", [16, 60])
def test_the_cache_takes_what_a_real_one_takes(model_type, length):
    check_cache(model_type, length)


@pytest.mark.parametrize("model_type", ["gemma3_text", "deepseek_v3", "qwen3_next", "mistral"])
def test_windows_latent_attention_and_linear_layers_are_counted_as_they_are(model_type):
    check_cache(model_type, 60)


def check_cache(model_type, length):
    model = zoo.build(model_type)
    with torch.no_grad():
        cache = model(**zoo.inputs(model, length=length), use_cache=True)[CACHE]
    held = sum(
        layer.keys.numel() + layer.values.numel()
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None
    )

    assert cache_bytes(zoo.text_config(model.config), length, 4) == 4 * held


def test_a_window_bounds_what_a_layer_keeps():
    config = zoo.text_config(zoo.config("gemma3_text"))
    config.sliding_window = 16

    short, long = cache_bytes(config, 16, 1), cache_bytes(config, 1000, 1)

    sliding = config.layer_types.count("sliding_attention")
    full = len(config.layer_types) - sliding
    per_position = 2 * config.num_key_value_heads * config.head_dim
    assert short == (sliding + full) * 16 * per_position
    assert long == (sliding * 16 + full * 1000) * per_position


def test_a_methods_effect_counts_pairs_and_unseen_angles():
    none = effect(NoScaling(), LLAMA2, 4 * 4096)
    linear = effect(Linear(4), LLAMA2, 4 * 4096)
    yarn = effect(Yarn(4), LLAMA2, 4 * 4096)
    dynamic = effect(Dynamic(4), LLAMA2, 4 * 4096)

    assert (none.kept, none.unseen) == (64, 18)
    assert (linear.kept, linear.slowed_in_full, linear.unseen, linear.nearest) == (0, 64, 0, 4.0)
    assert (yarn.kept, yarn.slowed_in_full, yarn.between) == (21, 18, 25)
    assert yarn.unseen == 0
    assert dynamic.nearest == 1.0
    assert dynamic.between + dynamic.slowed_in_full == 63


def test_the_bound_on_attention_is_that_of_its_paper():
    inv_freq = LLAMA2.inv_freq()

    found = decay(inv_freq, torch.tensor([0.0, 10.0, 1000.0]))

    for value, distance in zip(found, (0.0, 10.0, 1000.0), strict=True):
        sums = [
            abs(sum(complex(math.cos(distance * w), math.sin(distance * w)) for w in inv_freq[:j]))
            for j in range(1, 65)
        ]
        assert float(value) == pytest.approx(sum(sums) / sum(range(1, 65)))
    assert found[0] > found[1] > found[2]


def test_a_plan_names_factor_memory_effects_and_other_engines():
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=4096
    )
    site = text_site(config)

    found = plan_extension(config, site, 131072, {"yarn": Yarn(32)}, 2)

    assert found.factor == 32.0
    assert found.cache_bytes == 2 * 2 * 131072 * 2 * 4 * 128
    assert found.effects["yarn"].attention_scaling == pytest.approx(1.34657, abs=5e-6)
    assert found.exports["llama.cpp"] == (
        "--rope-scaling yarn --rope-scale 32.0 --yarn-orig-ctx 4096 --ctx-size 131072"
    )


def test_a_target_within_the_trained_length_is_refused():
    config = tiny_llama().config

    with pytest.raises(RopeError, match="the target 64 is within the trained length 64"):
        plan_extension(config, text_site(config), 64, {}, 2)


def test_an_unknown_trained_length_is_asked_for():
    config = tiny_llama({"rope_type": "linear", "factor": 2.0}).config

    with pytest.raises(RopeError, match="give original_max_position_embeddings"):
        text_site(config)
    assert text_site(config, 32).geometry.original_max_position_embeddings == 32


def test_curves_are_plain_data_of_every_method():
    found = curves(LLAMA2, {"none": NoScaling(), "yarn": Yarn(4)}, 4.0)

    assert found["target_length"] == 16384
    assert list(found["methods"]) == ["none", "yarn"]
    assert len(found["methods"]["yarn"]["wavelengths"]) == 64
    assert len(found["methods"]["yarn"]["decay"]) == len(found["distances"])


# a method, its farthest distance in 16384 positions, and where a key so far back is seen
REACHES = {
    "linear": ({"factor": 4}, 16383, lambda d: d),
    "rerope": ({"window": 1000}, 1000, lambda d: min(d, 1000)),
    "leaky_rerope": (
        {"window": 1000, "slowdown": 4.0},
        1000 + 15383 / 4,
        lambda d: d if d < 1000 else 1000 + (d - 1000) / 4,
    ),
    "streaming": ({"window": 100}, 103, lambda d: d if d < 100 else None),
    "dca": ({}, 4095, None),
}


@pytest.mark.parametrize("name", REACHES)
def test_angles_that_no_distance_reaches_are_not_unseen(name):
    own, farthest, _ = REACHES[name]
    method = make_method(name, **own)
    seen = 4096 * LLAMA2.inv_freq()
    reached = method.plan(LLAMA2).inv_freq * (farthest + 1)

    found = effect(method, LLAMA2, 16384)

    assert found.unseen == int(((seen < 2 * math.pi) & (reached > seen)).sum())


@pytest.mark.parametrize("name", [name for name in REACHES if name != "dca"])
def test_decay_is_drawn_at_the_distance_that_a_key_is_seen_at(name):
    own, _, seen_at = REACHES[name]
    method = make_method(name, **own)
    frequencies = method.plan(LLAMA2).inv_freq

    drawn = curves(LLAMA2, {name: method}, 4.0)

    for distance, height in zip(drawn["distances"], drawn["methods"][name]["decay"], strict=True):
        place = seen_at(distance)
        if distance > 30000:  # maybe the first keys, which streaming sees
            continue
        if place is None:
            assert height is None
            continue
        sums = torch.polar(torch.ones(64).double(), place * frequencies).cumsum(0).abs()
        assert height == pytest.approx(float(sums.mean()) / 32.5, abs=1e-6)
