"""What a model was trained with, read from it: against what its config and transformers say."""

from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import TRAINED, relative, tiny_llama
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from hf_rope_ext import AlreadyScaledError, RopeError, UnsupportedModelError, patch_model
from hf_rope_ext.models.find import find_towers
from hf_rope_ext.models.sites import axial_site, read_sites, window


def powers(base, dim, pairs=None):
    """The textbook frequencies, pair by pair; those beyond ``pairs`` rest."""
    pairs = dim // 2 if pairs is None else pairs
    return [base ** (-2 * i / dim) if i < pairs else 0.0 for i in range(dim // 2)]


# label, base, rotated dimensions, width of a head, pairs that turn, and the stored order
READ = {
    "llama": (None, 1e4, 16, 16, None, None),
    "gemma3_text": ("full_attention", 1e6, 16, 16, None, None),
    "modernbert": ("full_attention", 160000.0, 16, 16, None, None),
    "gemma4_text": ("full_attention", 1e6, 32, 32, 4, None),  # a wider head than other layers
    "deepseek_v3": (None, 1e4, 16, 32, None, None),  # 16 dimensions rotate and 16 do not
    "deepseek_v4": ("compress", 160000.0, 8, 64, None, None),  # no label says "sliding"
    "gpt_neox": (None, 1e4, 8, 32, None, None),
    "gptj": (None, 1e4, 8, 16, None, None),  # a table, and no base in the config
    "moonshine": (None, 1e4, 14, 16, None, None),
    "ernie4_5_vl_moe": (None, 500000.0, 16, 16, None, [0, 2, 4, 1, 3, 5, 6, 7]),
}


@pytest.mark.parametrize("kind", READ)
def test_what_was_trained_is_read_from_config_and_model(kind):
    label, base, dim, width, turning, order = READ[kind]
    model = zoo.build(kind)

    for site in (sites := read_sites(model)):
        assert (site.label, site.pair_order, site.rebuilt) == (label, order, None)
        found = site.geometry
        assert (found.base, found.rotary_dim, found.head_dim) == (base, dim, width)
        assert (found.rotated_pairs, found.original_max_position_embeddings) == (turning, TRAINED)
        assert site.rope_scaling["rope_type"] == "default"
        expected = torch.tensor(powers(base, dim, turning))[order or slice(None)]
        torch.testing.assert_close(site.inv_freq, expected, rtol=1e-5, atol=0)
        if not isinstance(site.rotary.original, torch.Tensor):
            name = "inv_freq" if label is None else f"{label}_inv_freq"
            live = getattr(model.get_submodule(site.path), name)
            assert torch.equal(site.inv_freq, live)
            assert site.inv_freq.data_ptr() != live.data_ptr()
    assert sites


def test_labels_can_be_asked_for_and_unknown_ones_are_told():
    model = zoo.build("gemma3_text")

    both = ("sliding_attention", "full_attention")
    found = {site.label: site.geometry.base for site in read_sites(model, layer_types=both)}
    assert found == {"sliding_attention": 1e4, "full_attention": 1e6}
    with pytest.raises(RopeError, match=r"'other'\. It has: full_attention, sliding_attention"):
        read_sites(model, layer_types=("full_attention", "other"))
    with pytest.raises(RopeError, match="It has: one set for all layers"):
        read_sites(tiny_llama(), layer_types=("other",))


def test_every_set_has_a_trained_length_of_its_own():
    model = zoo.build("moonshine")

    for lengths, expected in (([32, 48], [32, 48]), ((32, 48), [32, 48]), (40, [40, 40])):
        sites = read_sites(model, original_max_position_embeddings=lengths)
        assert [site.geometry.original_max_position_embeddings for site in sites] == expected
    with pytest.raises(RopeError, match=r"has 3 lengths for 2 sets .*encoder.*, .*decoder"):
        read_sites(model, original_max_position_embeddings=[32, 48, 64])


PUBLISHED = 16  # trained length, where a config has one beside the extended length
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "found", "trained"),
    [
        ({"rope_type": "default"}, "default", TRAINED),
        ({"rope_type": "linear", "factor": 1.0}, "default", TRAINED),
        ({"rope_type": "linear", "factor": 4.0}, "linear", 0),  # the config has one of the two
        ({"rope_type": "dynamic", "factor": 4.0}, "dynamic", TRAINED),
        ({"rope_type": "yarn", "factor": 4.0}, "yarn", PUBLISHED),
        ({"rope_type": "llama3", "factor": 4.0, **LLAMA3}, "llama3", PUBLISHED),
        ({"rope_type": "longrope", "factor": 4.0, **LONGROPE}, "longrope", PUBLISHED),
    ],
)
def test_the_scaling_in_force_and_the_length_before_it(scaling, found, trained):
    if trained == PUBLISHED:
        scaling = {**scaling, "original_max_position_embeddings": PUBLISHED}
    (site,) = read_sites(tiny_llama(scaling))

    assert site.rope_scaling["rope_type"] == found
    assert site.geometry.original_max_position_embeddings == trained
    assert site.rebuilt is None
    expected = torch.tensor(powers(1e4, 16))  # never those of the scaling
    torch.testing.assert_close(site.inv_freq, expected, rtol=1e-5, atol=0)


def test_a_scaling_that_the_loaded_model_does_not_follow_is_known_as_edited():
    model = tiny_llama()
    model.config.rope_parameters = {
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": PUBLISHED,
    }  # fmt: skip
    (site,) = read_sites(model)

    assert site.rope_scaling["edited"] is True
    assert site.rope_scaling["rope_type"] == "yarn"
    assert site.geometry.original_max_position_embeddings == TRAINED


def proportional(factor):
    """A Gemma 4 whose full attention has this factor; None for none."""
    scaled = {} if factor is None else {"factor": factor}
    return zoo.build(
        "gemma4_text",
        lambda rope: {**rope, **scaled} if rope["rope_type"] == "proportional" else rope,
    )


@pytest.mark.parametrize("factor", [None, 1.0, 4.0])
def test_a_proportional_rope_is_read_with_or_without_a_factor(factor):
    model = proportional(factor)
    (site,) = read_sites(model)

    assert site.geometry.original_max_position_embeddings == (0 if factor == 4.0 else TRAINED)
    known = "proportional (scaled)" if factor == 4.0 else "default"
    assert site.rope_scaling["rope_type"] == known
    live = model.model.rotary_emb.full_attention_inv_freq
    unscaled = torch.tensor(powers(1e6, 32, 4))
    torch.testing.assert_close(live * (factor or 1.0), unscaled, rtol=1e-5, atol=0)
    torch.testing.assert_close(site.inv_freq, unscaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize("own", [None, 1.0, 2.0])
def test_a_proportional_rope_is_extended_as_transformers_does_it(own):
    model, stock = proportional(own), proportional(4.0)
    inputs = zoo.inputs(model)
    replacing = {"replace": True, "original_max_position_embeddings": TRAINED}

    if own == 2.0:
        with pytest.raises(AlreadyScaledError, match=r"'proportional \(scaled\)'"):
            patch_model(model, "linear", factor=4)
    patch_model(model, "linear", factor=4, **(replacing if own == 2.0 else {}))

    assert relative(zoo.run(model, **inputs), zoo.run(stock, **inputs)) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2_vl", "diffusion_gemma"])
def test_a_vision_tower_is_read_as_transformers_computes_it(kind):
    model = zoo.build(kind)
    (tower,) = find_towers(model)
    site = axial_site(tower, 16)

    stock, _ = type(tower.original).compute_axial_rope_parameters(tower.original.config)
    assert torch.equal(site.inv_freq, stock)
    assert site.label is None
    assert site.rebuilt is None
    assert site.rope_scaling["rope_type"] == "default"
    found = site.geometry
    assert found.original_max_position_embeddings == 16
    assert found.rotary_dim == 2 * stock.shape[-1]
    assert found.base == tower.original.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("fault", ["zeros", "bfloat16", "scaled", "meta"])
def test_what_a_buffer_lost_comes_back_from_the_config(fault):
    model = tiny_llama()
    rotary = model.model.rotary_emb
    stock, _ = rotary.compute_default_rope_parameters(model.config)
    spoilt = {
        "zeros": lambda: torch.zeros(8),
        "bfloat16": lambda: stock.bfloat16(),
        "scaled": lambda: stock * (1 + 2e-5),
        "meta": lambda: stock.to("meta"),
    }
    rotary.inv_freq = spoilt[fault]()
    (site,) = read_sites(model)

    assert torch.equal(site.inv_freq, stock)
    reasons = {"zeros": "only zeros", "bfloat16": "cast to bfloat16", "scaled": "did not follow"}
    assert (site.rebuilt is None) == (fault == "meta")
    assert reasons.get(fault, "") in (site.rebuilt or "")


def test_a_rounding_error_of_a_buffer_is_kept_to_the_bit():
    model = tiny_llama()
    model.model.rotary_emb.inv_freq *= 1 + 5e-6
    (site,) = read_sites(model)

    assert site.rebuilt is None
    assert torch.equal(site.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("base", [10000.0, 12345.5])
def test_a_base_is_recovered_from_frequencies_whether_whole_or_not(base):
    model = tiny_llama({"rope_theta": base})
    del model.config.rope_parameters["rope_theta"]
    (site,) = read_sites(model)

    # a whole number is found exactly, any other as far as float32 tells
    assert site.geometry.base == pytest.approx(base, rel=1e-5)
    assert site.geometry.base == base or base % 1
    assert torch.equal(site.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("spoil", ["reversed", "negative", "nan", "half"])
def test_no_base_is_recovered_from_other_frequencies(spoil):
    model = tiny_llama()
    live = model.model.rotary_emb.inv_freq
    spoilt = {
        "reversed": live.flip(0), "negative": -live, "nan": live / 0 * 0, "half": live / 2,
    }  # fmt: skip
    model.model.rotary_emb.inv_freq = spoilt[spoil]
    del model.config.rope_parameters["rope_theta"]

    with pytest.raises(UnsupportedModelError, match="cannot be recovered"):
        read_sites(model)


def test_frequencies_of_an_unknown_rule_are_refused(monkeypatch):
    model = tiny_llama()
    rule = type(model.model.rotary_emb).compute_default_rope_parameters
    monkeypatch.setattr(
        type(model.model.rotary_emb),
        "compute_default_rope_parameters",
        staticmethod(lambda *words, **named: (rule(*words, **named)[0] ** 2, 1.0)),
    )

    with pytest.raises(UnsupportedModelError, match="in a way this package does not know"):
        read_sites(model)


def test_an_odd_number_of_rotated_dimensions_is_told_from_an_even_one(monkeypatch):
    """As a head of 15: eight pairs, whose powers are of a fifteenth."""
    model = tiny_llama()
    rotary = model.model.rotary_emb
    odd = torch.tensor([1e4 ** (-2 * i / 15) for i in range(8)])
    monkeypatch.setattr(
        type(rotary), "compute_default_rope_parameters", staticmethod(lambda *_, **__: (odd, 1.0))
    )
    rotary.inv_freq = odd.clone()
    (site,) = read_sites(model)

    assert site.geometry.rotary_dim == 15
    assert site.rebuilt is None
    assert torch.equal(site.inv_freq, odd)


MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
FULL = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: LlamaConfig(), None),
        (lambda: MistralConfig(sliding_window=512), 512),
        (lambda: MistralConfig(sliding_window=None), None),
        (lambda: Qwen2Config(use_sliding_window=False, sliding_window=512), None),
        (lambda: Gemma3TextConfig(**MIXED, sliding_window=512), 512),
        (lambda: Gemma3TextConfig(**FULL, sliding_window=512), None),
        (lambda: SimpleNamespace(layer_types=["chunked_attention"], sliding_window=9), 9),
    ],
)
def test_a_bounded_window_is_told_only_where_a_layer_has_one(config, expected):
    assert window(config()) == expected
