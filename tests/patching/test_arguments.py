"""Arguments of `patch_model` at their limits, and what a patch cannot reach by itself."""

import math
import warnings

import pytest
import torch
import zoo
from conftest import TRAINED, logits, tiny_llama
from method_knobs import knobs
from transformers import T5GemmaForConditionalGeneration

from hf_rope_ext import (
    RopeError,
    UnsupportedModelError,
    describe,
    load_pretrained,
    patch_model,
    patched,
)
from hf_rope_ext.errors import MethodParameterError
from hf_rope_ext.geometry import RopeGeometry
from hf_rope_ext.methods import METHODS, Yarn
from hf_rope_ext.methods import knobs as known_knobs
from hf_rope_ext.models.find import find_rotaries
from hf_rope_ext.rotary.extended import ExtendedRotary

# the towers below have a sliding window, which a patch warns about
pytestmark = pytest.mark.filterwarnings("ignore:.*sliding window:hf_rope_ext.errors.RopeWarning")

# bad input is one clear error, and nothing is changed

EXTREMES = [1e-320, 1.7e308, 1e300, 1e30, 10**30, 10**400, -1.0, math.nan, True, "4", [4.0]]
LISTS = ("long_factor", "short_factor")
NUMBERS = [
    (name, knob)
    for name, method in METHODS.items()
    for knob in known_knobs(method)
    if knob not in ("truncate", "ramp", "blend", "hard_clip", *LISTS)
]


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize(("method", "knob"), NUMBERS)
def test_a_knob_at_the_end_of_all_numbers_is_refused_or_served_and_never_overflows(
    ids, method, knob
):
    model = tiny_llama()
    before = model.config.to_dict()
    for value in EXTREMES:
        try:
            with patched(model, method, **{**knobs(method), knob: value}):
                assert torch.isfinite(logits(model, ids)).all()
        except RopeError:
            pass
        assert model.config.to_dict() == before
        assert not isinstance(model.model.rotary_emb, ExtendedRotary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1e30}, r"factor must be a finite number at most 1\.07374e\+09, got 1e\+30"),
        ({"factor": 10**400}, "factor must be a finite number at least 1, got"),
        ({"target_length": 10**30}, "target_length must be an integer from 1 to"),
        (
            {"factor": 4, "original_max_position_embeddings": 2**60},
            "original_max_position_embeddings must be an integer from 2 to",
        ),
        (
            {"factor": 4, "original_max_position_embeddings": 2**53},
            rf"is for {2**55} positions on a trained length of {2**53}; the most is {2**53}",
        ),
        (
            {"factor": 4, "attention_factor": 1e-320},
            "attention_factor must be a number that float32",
        ),
    ],
)
def test_a_number_too_large_or_too_small_is_named_with_what_is_allowed(arguments, message):
    model = tiny_llama()
    before = model.config.to_dict()

    with pytest.raises(MethodParameterError, match=message):
        patch_model(model, "yarn", **arguments)

    assert model.config.to_dict() == before


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
def test_a_softmax_scale_that_cannot_follow_the_request_is_refused_where_there_would_be_one():
    pair = {"factor": 4, "mscale": 0.7, "mscale_all_dim": 0.5}
    with pytest.raises(MethodParameterError, match="cannot follow each request; use attention"):
        patch_model(zoo.build("deepseek_v3"), "dynamic_yarn", **pair)
    with pytest.raises(MethodParameterError, match="cannot follow each request; use attention"):
        patch_model(zoo.build("deepseek_v3"), "dynamic_yarn+cope", **pair)

    patch_model(zoo.build("deepseek_v3"), "dynamic_yarn", factor=4)
    patch_model(tiny_llama(), "dynamic_yarn", **pair)


def test_the_longest_length_and_the_largest_factor_are_served(llama, ids):
    with patched(llama, "linear", factor=2.0**30):
        assert llama.config.max_position_embeddings == TRAINED * 2**30
    with patched(llama, "yarn", factor=4, original_max_position_embeddings=2**51):
        assert llama.config.max_position_embeddings == 2**53


def test_a_config_in_place_of_a_model_is_not_shown_in_full():
    config = tiny_llama().config

    with pytest.raises(UnsupportedModelError) as told:
        find_rotaries(config)

    assert "LlamaConfig" in str(told.value)
    assert len(str(told.value)) < 300


# what is around a model


class Encoder(torch.nn.Module):
    """Cuts its inputs, as a SentenceTransformer does."""

    def __init__(self, model, limit):
        super().__init__()
        self.model = model
        self.max_seq_length = limit


@pytest.mark.parametrize(("limit", "warns"), [(64, True), (255, True), (256, False), (None, False)])
def test_a_limit_around_the_model_that_still_cuts_is_told(limit, warns):
    model = Encoder(tiny_llama(), limit)
    words = f"Encoder cuts inputs to max_seq_length={limit} tokens; set max_seq_length=256"

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch_model(model, "yarn", factor=4)

    assert [words in str(warning.message) for warning in said] == [True] * warns
    assert (words in str(describe(model))) == warns


# an encoder and a decoder that were trained at other lengths


def towers(encoder=64, decoder=128):
    config = zoo.config("t5gemma")
    for part, length in ((config.encoder, encoder), (config.decoder, decoder)):
        part.max_position_embeddings = length
        part.head_dim = 32
    torch.manual_seed(0)
    return T5GemmaForConditionalGeneration(config).eval()


def planned(model):
    """The frequencies of encoder and decoder."""
    return [
        part.rotary_emb.inv_freq.double() for part in (model.model.encoder, model.model.decoder)
    ]


def test_a_factor_extends_each_tower_from_its_own_trained_length(tmp_path):
    model = patch_model(towers(), "yarn", factor=4)
    expected = [Yarn(4).plan(RopeGeometry(32, 10000.0, length)).inv_freq for length in (64, 128)]

    assert not torch.allclose(*expected)
    for found, wanted in zip(planned(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert model.config.encoder.max_position_embeddings == 256
    assert model.config.decoder.max_position_embeddings == 512
    model.save_pretrained(tmp_path)
    for found, wanted in zip(planned(load_pretrained(tmp_path)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("yarn", {"target_length": 256}),
        ("dynamic_yarn", {"target_length": 256}),
        ("yarn", {"factor": 4, "limit_only": True}),
    ],
)
def test_a_length_that_would_need_two_factors_is_refused(method, arguments):
    model = towers()

    with pytest.raises(MethodParameterError, match=r"trained at 64, 128|trained lengths differ"):
        patch_model(model, method, **arguments)

    assert model.config.encoder.max_position_embeddings == 64
    assert describe(model).method is None


def test_a_length_that_needs_one_factor_is_served_on_towers():
    assert describe(patch_model(towers(64, 64), "yarn", target_length=256)).factor == 4
    by_hand = patch_model(
        towers(64, 64), "yarn", factor=4, original_max_position_embeddings=[64, 128]
    )
    for found, wanted in zip(
        planned(by_hand), planned(patch_model(towers(), "yarn", factor=4)), strict=True
    ):
        assert torch.equal(found, wanted)
    limited = patch_model(towers(), "none", limit_only=True, target_length=256)
    assert limited.config.decoder.max_position_embeddings == 256
    based = patch_model(towers(), "base", rope_theta=1e6, target_length=256)
    assert based.config.encoder.max_position_embeddings == 256


@pytest.mark.parametrize("lengths", [[64], [64, 128, 64], [64, 1], [64, "128"], []])
def test_trained_lengths_that_fit_no_towers_are_refused(lengths):
    with pytest.raises(RopeError, match="original_max_position_embeddings"):
        patch_model(towers(), "yarn", factor=4, original_max_position_embeddings=lengths)
