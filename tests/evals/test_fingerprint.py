"""Results are resumed only under the settings that they were made with."""

import json
from dataclasses import fields, replace
from importlib.metadata import version

import pytest
import torch
import vision
import zoo
from accelerate import dispatch_model
from conftest import logits, tiny_llama
from evaluating import TEXT, make_tokenizer, small, wide_llama, word_piece
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from hf_rope_ext import RopeError, VisualPositions, load_pretrained, patch_model
from hf_rope_ext.evals.compare import Comparison, compare, evaluate
from hf_rope_ext.evals.documents import build_dataset
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
    "original_max_position_embeddings": lambda: 32,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Comparison)])
def test_every_field_of_a_comparison_changes_its_settings(tokenizer, name):
    settings = small(tokenizer).settings()

    assert small(tokenizer).settings() == settings
    assert replace(small(tokenizer), **{name: CHANGES[name]()}).settings() != settings


def patched_model():
    return patch_model(wide_llama(), "yarn", factor=2)


def ends_elsewhere():
    model = wide_llama()
    model.generation_config.eos_token_id = [3, 7]
    return model


# what changes each entry, and of the other entries at most those that follow from it
ENTRIES = {
    "model.name": {"name": lambda: "another"},
    "model.model_type": {"model": lambda: mistral()},
    "model.parameters": {"model": lambda: tiny_llama(vocab_size=512, num_hidden_layers=1)},
    "model.dtype": {"model": lambda: wide_llama().bfloat16()},
    "model.attention": {"model": lambda: tiny_llama(vocab_size=512, attn_implementation="eager")},
    "model.weights_sha256": {"model": other_weights},
    "model.modules_sha256": {"model": lambda: attend_sharply(wide_llama())},
    "model.config_sha256": {"model": lambda: tiny_llama(vocab_size=512, rms_norm_eps=1e-3)},
    "model.trained_length": {"original_max_position_embeddings": lambda: 32},
    "model.rope_parameters": {"model": lambda: tiny_llama({"rope_theta": 5e5}, vocab_size=512)},
    "model.patches": {"model": patched_model},
    "answers": {"model": ends_elsewhere},
    "tokenizer_sha256": {"tokenizer": CHANGES["tokenizer"]},
    "processor_sha256": {"processor": CHANGES["processor"]},
    "methods": {"methods": CHANGES["methods"]},
    "replace": {"replace": CHANGES["replace"]},
    "tasks": {"tasks": CHANGES["tasks"]},
    "lengths": {"lengths": CHANGES["lengths"]},
    "text_sha256": {"text": CHANGES["text"]},
    "windows": {"windows": CHANGES["windows"]},
    "targets": {"targets": CHANGES["targets"]},
    "samples": {"samples": CHANGES["samples"]},
    "seed": {"seed": CHANGES["seed"]},
}
ELSEWHERE = {"schema_version", "versions", "sources"}  # tested on their own


def entries(comparison):
    settings = comparison.settings()
    return settings | {f"model.{name}": value for name, value in settings.pop("model").items()}


def test_every_entry_of_the_settings_is_one_that_is_tried(tokenizer):
    assert set(entries(small(tokenizer))) == ENTRIES.keys() | ELSEWHERE


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_of_the_settings_follows_what_it_is_named_for(tokenizer, entry):
    changes = {name: make() for name, make in ENTRIES[entry].items()}

    before, after = entries(small(tokenizer)), entries(replace(small(tokenizer), **changes))

    assert before[entry] != after[entry]


def test_results_of_other_code_are_not_resumed(tokenizer, tmp_path, monkeypatch):
    ask = {"tokenizer": tokenizer, "tasks": ["rope_copy"], "lengths": [100], "samples": 1}
    ask["beyond"] = True
    evaluate(wide_llama(), output=tmp_path, **ask)

    for name in ("hf-rope-ext", "transformers", "torch"):
        with monkeypatch.context() as other:
            other.setattr(
                "hf_rope_ext.evals.fingerprint.version",
                lambda package, name=name: "0.0" if package == name else version(package),
            )
            with pytest.raises(RopeError, match="different versions"):
                evaluate(wide_llama(), output=tmp_path, **ask)
    monkeypatch.setattr("hf_rope_ext.evals.compare.SCHEMA_VERSION", 99)
    with pytest.raises(RopeError, match="different schema_version"):
        evaluate(wide_llama(), output=tmp_path, **ask)


QUESTIONS = [
    {
        "question": f"Who is number {number}?",
        "answer": f"cat {number}",
        "context": [[f"Title {number}", ["the cat sat", f"on mat {number}"]]],
    }
    for number in range(4)
]


@pytest.mark.parametrize(
    ("task", "content", "other"),
    [
        ("rope_needle:depths=[1]:haystack", "One dog ran. Two ran.", "Six cats sat. They did."),
        ("rope_ruler_qa_2:data", json.dumps(QUESTIONS), json.dumps(QUESTIONS[1:])),
    ],
)
def test_a_file_of_another_content_is_another_comparison(tokenizer, tmp_path, task, content, other):
    path = tmp_path / "file"
    ask = {"tokenizer": tokenizer, "tasks": [f"{task}={path}"], "lengths": [700], "samples": 1}
    ask |= {"beyond": True, "output": tmp_path / "report"}
    path.write_text(content)
    first = evaluate(wide_llama(), **ask)

    path.write_text(other)
    with pytest.raises(RopeError, match="different sources"):
        evaluate(wide_llama(), **ask)
    (document,) = build_dataset(task.partition(":")[0], tokenizer, [700], 1, **options(task, path))
    path.write_text(content)
    assert evaluate(wide_llama(), **ask).cells == first.cells
    (again,) = build_dataset(task.partition(":")[0], tokenizer, [700], 1, **options(task, path))
    assert document["prompt"] != again["prompt"]


def options(task, path):
    found = {task.rpartition(":")[2]: str(path)}
    return found | ({"depths": [1]} if "depths" in task else {})


def last_weight(model):
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    return model


def attend_sharply(model):
    model.model.layers[1].self_attn.scaling *= 3
    return model


def turn_slowly(model):
    model.model.rotary_emb.inv_freq /= 2
    return model


def scale_the_rotation(model):
    model.model.rotary_emb.attention_scaling = 1.5
    return model


def adapted(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def switched_off(model):
    model = adapted(model)
    model.base_model.disable_adapter_layers()
    return model


def weakened(model):
    model = adapted(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.1
    return model


def deaf(model):
    model.config.sliding_window = 4
    return model


DIFFERENT = {
    "one weight at the end": (wide_llama, lambda: last_weight(wide_llama())),
    "a softmax scale": (wide_llama, lambda: attend_sharply(wide_llama())),
    "a buffer that is not saved": (wide_llama, lambda: turn_slowly(wide_llama())),
    "a rotary temperature": (wide_llama, lambda: scale_the_rotation(wide_llama())),
    "an adapter": (lambda: adapted(wide_llama()), lambda: switched_off(wide_llama())),
    "the weight of an adapter": (lambda: adapted(wide_llama()), lambda: weakened(wide_llama())),
    "a setting of the live config": (lambda: mistral(), lambda: deaf(mistral())),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_models_that_compute_otherwise_never_share_results(tokenizer, difference):
    one, other = (build().eval() for build in DIFFERENT[difference])
    ids = torch.randint(0, 512, (1, 60))

    assert not torch.equal(logits(one, ids), logits(other, ids))
    assert model_settings(one, "model") != model_settings(other, "model")


def after_a_run(model):
    model.generate(torch.randint(5, 90, (1, 200)), max_new_tokens=3)
    return model


def after_training(model):
    model.train()
    model.activation_checkpointing_enable()
    ids = torch.randint(5, 90, (1, 20))
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    return model.eval()


NATIVE = {
    "default": {},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.filterwarnings("ignore")  # gradient checkpointing has many names
@pytest.mark.parametrize("use", [after_a_run, after_training])
@pytest.mark.parametrize("scaling", NATIVE)
def test_a_model_is_the_same_before_and_after_use(use, scaling):
    model = native(NATIVE[scaling])
    before = model_settings(model, "model")

    assert model_settings(use(model), "model") == before


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "recurrent_gemma", "gemma3_text"])
def test_states_that_a_model_keeps_of_a_request_are_no_setting(model_type):
    model = zoo.build(model_type).eval()
    before = model_settings(model, "model")

    logits(model, torch.randint(5, 60, (1, 20)))

    assert model_settings(model, "model") == before


def test_weights_on_a_disk_count_as_those_in_memory(tmp_path):
    model = wide_llama()
    before = model_settings(model, "model")
    places = {name: "cpu" for name, _ in model.named_children()}
    places |= {"model": "disk"}

    dispatched = dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )

    assert any(weight.is_meta for weight in dispatched.parameters())
    assert model_settings(dispatched, "model")["weights_sha256"] == before["weights_sha256"]
    assert model_settings(dispatched, "model")["modules_sha256"] == before["modules_sha256"]


def test_a_difference_is_named_with_both_values(tokenizer, tmp_path):
    ask = {"tokenizer": tokenizer, "tasks": ["rope_copy"], "lengths": [100], "samples": 1}
    ask["beyond"] = True
    evaluate(wide_llama(), output=tmp_path, **ask)

    with pytest.raises(RopeError, match=r"different model\.name, seed \(42 there, 7 here\)"):
        evaluate(wide_llama(), output=tmp_path, seed=7, name="another", **ask)


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
