"""Results are resumed only under the settings that they were made with."""

from dataclasses import fields, replace

import pytest
import vision
from conftest import tiny_llama
from evaluating import TEXT, make_tokenizer, small, wide_llama, word_piece
from transformers import MistralConfig, MistralForCausalLM

from hf_rope_ext import RopeError, VisualPositions, load_pretrained, patch_model
from hf_rope_ext.evals.compare import Comparison, compare, evaluate
from hf_rope_ext.evals.fingerprint import model_settings, processor_digest, tokenizer_digest
from hf_rope_ext.methods import Yarn

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def native(scaling):
    return tiny_llama(scaling, vocab_size=512, max_position_embeddings=256)


def other_weights():
    model = wide_llama()
    model.model.embed_tokens.weight.data += 1
    return model


CHANGES = {
    "model": other_weights,
    "tokenizer": lambda: make_tokenizer(word_piece),
    "text": lambda: TEXT + " more",
    "methods": lambda: {"yarn": Yarn(8, beta_fast=16)},
    "lengths": lambda: (420,),
    "tasks": lambda: ("rope_passkey_ll:depths=[1]",),
    "windows": lambda: 3,
    "targets": lambda: 9,
    "samples": lambda: 3,
    "seed": lambda: 1,
    "name": lambda: "another",
    "replace": lambda: True,
    "processor": vision.processor,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Comparison)])
def test_every_field_of_a_comparison_changes_its_settings(tokenizer, name):
    settings = small(tokenizer).settings()

    assert small(tokenizer).settings() == settings
    assert replace(small(tokenizer), **{name: CHANGES[name]()}).settings() != settings


def test_two_scalings_in_the_config_do_not_share_results(tokenizer, tmp_path):
    ask = {"tokenizer": tokenizer, "tasks": ["rope_copy"], "lengths": [200], "samples": 1}
    evaluate(native(YARN), output=tmp_path, **ask)

    with pytest.raises(RopeError, match=r"different .*model\.rope_parameters"):
        evaluate(native(LLAMA3), output=tmp_path, **ask)
    again = evaluate(native(YARN), output=tmp_path, **ask)
    assert again.settings["model"]["rope_parameters"]["rope_type"] == "yarn"


def mistral():
    model = wide_llama()
    config = {**model.config.to_dict(), "sliding_window": None, "model_type": "mistral"}
    other = MistralForCausalLM(MistralConfig(**config))
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("model_type", mistral),
        ("trained_length", lambda: tiny_llama(vocab_size=512, max_position_embeddings=128)),
        ("rope_parameters", lambda: tiny_llama({"rope_theta": 5e5}, vocab_size=512)),
        ("config_sha256", lambda: tiny_llama(vocab_size=512, rms_norm_eps=1e-3)),
    ],
)
def test_models_of_the_same_weights_are_told_apart_by_their_config(name, build):
    before, after = (model_settings(model, "model") for model in (wide_llama(), build()))

    assert before["weights_sha256"] == after["weights_sha256"]
    assert before[name] != after[name]


def test_a_copy_in_another_directory_is_the_same_model(tokenizer, tmp_path):
    for name in ("here", "there"):
        wide_llama().save_pretrained(tmp_path / name)

    here, there = (
        model_settings(load_pretrained(tmp_path / name), "model") for name in ("here", "there")
    )

    assert here == there


PATCHES = [
    {"method": "linear", "factor": 4},
    {"method": "yarn", "factor": 4},
    {"method": "yarn", "factor": 4, "beta_fast": 16},
    {"method": "yarn", "factor": 4, "temperature": "logits"},
    {"method": "yarn", "target_length": 300},
    {"method": "yarn", "factor": 4, "original_max_position_embeddings": 32},
    {"method": "dynamic_yarn", "factor": 4},
    {"method": "dynamic_yarn", "factor": 4, "buckets": 2},
    {"method": "dynamic_yarn", "factor": 4, "on_growth": "freeze"},
    {"method": "dynamic_yarn", "factor": 4, "compat": "transformers"},
]
TOWER = {"target": "vision", "original_max_position_embeddings": 8}
VISUAL_PATCHES = [
    {"method": "linear", "factor": 4},
    {"method": {"t": "linear"}, "factor": 4},
    {"method": "linear", "factor": 4, "mrope_layout": "interleaved"},
    {"method": "linear", "factor": 4, "visual_positions": VisualPositions(factor=2.0)},
    {"method": "linear", "factor": 4, **TOWER},
    {"method": "linear", "factor": 2, **TOWER},
]


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
def test_no_two_patches_share_results():
    processor = vision.processor()
    text = [patch_model(wide_llama(), **patch) for patch in PATCHES]
    visual = [patch_model(vision.model(processor), **patch) for patch in VISUAL_PATCHES]
    records = [
        [model_settings(model, "model")["patches"] for model in models]
        for models in ([wide_llama(), *text], [vision.model(processor), *visual])
    ]

    for group in records:
        assert all(one != other for index, one in enumerate(group) for other in group[:index])
    assert records[0][1]["text"]["method"] == {"name": "linear", "factor": 4.0}
    assert records[1][-1]["text"] is None


def test_a_patched_model_resumes_only_its_own_results(tokenizer, tmp_path):
    ask = {"tokenizer": tokenizer, "tasks": ["rope_copy"], "lengths": [200], "samples": 1}
    evaluate(patch_model(wide_llama(), "yarn", factor=4), output=tmp_path, **ask)
    other = patch_model(wide_llama(), "yarn", factor=4, temperature="logits")

    with pytest.raises(RopeError, match=r"different .*model\.patches"):
        evaluate(other, output=tmp_path, **ask)


def test_digests_do_not_depend_on_the_last_call(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer(["a b c"], max_length=2, truncation=True)

    assert tokenizer_digest(tokenizer) == before
    assert processor_digest(vision.processor()) == processor_digest(vision.processor())
    assert processor_digest(vision.processor(do_normalize=False)) != processor_digest(
        vision.processor()
    )


def test_training_mode_is_left_as_it_was(tokenizer):
    model = wide_llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    during = []
    model.lm_head.register_forward_hook(lambda head, *_: during.append(model.training))

    evaluate(model, tokenizer, ["rope_copy"], [128], samples=1, beyond=True)
    compare(small(tokenizer, model=model, tasks=("rope_short",), lengths=(64,)))

    assert [module.training for module in model.modules()] == before
    assert during
    assert not any(during)
