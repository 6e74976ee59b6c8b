"""`load_pretrained` takes all that `from_pretrained` takes, for classes of any origin."""

import importlib.util
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import logits, relative, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_rope_ext import (
    NotPatchedError,
    RopeError,
    load_pretrained,
    patch_model,
    restore_patch,
    save_pretrained,
    unpatch_model,
)
from hf_rope_ext.saving.classes import find_class

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyLlama(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture(params=["yarn", "dynamic_yarn", None])
def saved(request, tmp_path, ids):
    """A model saved with or without a patch, and its logits."""
    model = tiny_llama()
    if request.param:
        patch_model(model, request.param, factor=4)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", logits(model, ids)


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        ({"dtype": "auto"}, lambda model: model.dtype == torch.float32),
        ({"dtype": torch.bfloat16}, lambda model: model.dtype == torch.bfloat16),
        ({"dtype": "bfloat16"}, lambda model: model.dtype == torch.bfloat16),
        ({"torch_dtype": torch.float64}, lambda model: model.dtype == torch.float64),
        ({"use_cache": False}, lambda model: model.config.use_cache is False),
        ({"id2label": {0: "no"}}, lambda model: model.config.id2label == {0: "no"}),
        (
            {"attn_implementation": "eager"},
            lambda model: model.config._attn_implementation == "eager",
        ),
        ({"device_map": "cpu"}, lambda model: model.device.type == "cpu"),
        ({"use_safetensors": True, "low_cpu_mem_usage": True}, lambda model: True),
    ],
)  # fmt: skip
def test_arguments_of_from_pretrained_do_the_same(arguments, holds, saved, ids):
    directory, expected = saved
    tolerance = 0.1 if arguments.get("dtype") in (torch.bfloat16, "bfloat16") else 1e-4

    found = load_pretrained(directory, **arguments)

    assert holds(found)
    assert type(found) is LlamaForCausalLM
    assert relative(logits(found, ids).float(), expected) < tolerance


def test_loading_information_comes_with_the_model(saved, ids):
    directory, expected = saved

    found, information = load_pretrained(directory, output_loading_info=True)

    assert torch.equal(logits(found, ids), expected)
    _, stock = LlamaForCausalLM.from_pretrained(
        directory, config=tiny_llama().config, output_loading_info=True
    )
    assert information == stock


def test_a_config_may_be_given(saved, ids, tmp_path):
    directory, expected = saved
    for given in (
        AutoConfig.from_pretrained(directory),  # with the record, where there is one
        tiny_llama().config,
        directory,
        str(directory),
    ):
        assert torch.equal(logits(load_pretrained(directory, config=given), ids), expected)
    config = AutoConfig.from_pretrained(directory, attn_implementation="eager")
    assert load_pretrained(directory, config=config).config._attn_implementation == "eager"


def test_weights_in_memory_come_back_from_their_config(saved, ids):
    directory, expected = saved
    weights = load_pretrained(directory).state_dict()
    settings = json.loads((directory / "config.json").read_text())

    found = load_pretrained(None, config=LlamaConfig.from_dict(settings), state_dict=weights)

    assert torch.equal(logits(found, ids), expected)
    with pytest.raises(RopeError, match="config= and state_dict="):
        load_pretrained(None)


def test_a_state_dict_with_its_config_is_stopped_or_restored():
    model = zoo.build("gptj")
    inputs = zoo.inputs(model, length=60)
    clean = GPTJConfig.from_dict(model.config.to_dict())
    patch_model(model, "linear", factor=4)
    settings, weights = model.config.to_dict(), model.state_dict()
    expected = zoo.run(model, **inputs)

    with pytest.raises(ValueError, match=r"load this model with hf_rope_ext\.load_pretrained"):
        GPTJForCausalLM(GPTJConfig.from_dict(settings))
    built = GPTJForCausalLM(clean).eval()
    built.load_state_dict(weights)
    restore_patch(built, settings)

    assert torch.equal(zoo.run(built, **inputs), expected)


def test_a_quantized_model_is_loaded_patched(saved, ids):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    directory, _ = saved
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    found = load_pretrained(directory, quantization_config=quantized)

    assert any(isinstance(part, bitsandbytes.nn.Linear4bit) for part in found.modules())
    assert hasattr(found.config, "hf_rope_ext") == hasattr(
        AutoConfig.from_pretrained(directory), "hf_rope_ext"
    )


def test_a_gguf_file_is_loaded_as_stock_does(tmp_path, ids):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, tiny_llama(), path)

    found = load_pretrained(tmp_path, gguf_file=path.name)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert torch.equal(logits(found, ids), logits(stock, ids))


def write_gguf(gguf, model, path):
    """Write a Llama as llama.cpp's converter does, queries and keys in its order."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            halves = weight.reshape(heads, 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def remote(tmp_path):
    """A module with a model class of its own, saved along with its models."""
    path = tmp_path / "modeling_my_llama.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("modeling_my_llama", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.MyConfig.register_for_auto_class()
    module.MyLlama.register_for_auto_class("AutoModelForCausalLM")
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn", None])
def test_remote_code_comes_back_patched(method, remote, tmp_path, ids):
    model = remote.MyLlama(remote.MyConfig(**tiny_llama().config.to_dict()))
    model.load_state_dict(tiny_llama().state_dict())
    if method:
        patch_model(model, method, factor=4)
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "saved")

    found = load_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(found).__name__ == "MyLlama"
    assert torch.equal(logits(found, ids), expected)
    known = load_pretrained(
        tmp_path / "saved", trust_remote_code=True, model_class=AutoModelForCausalLM
    )
    assert torch.equal(logits(known, ids), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(tmp_path / "saved")


class Scorer(LlamaForSequenceClassification):
    """A class that only this file knows."""


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn"])
def test_a_class_that_transformers_does_not_know_is_asked_for(method, tmp_path, ids):
    torch.manual_seed(0)
    model = Scorer(LlamaConfig(**{**tiny_llama().config.to_dict(), "pad_token_id": 0})).eval()
    patch_model(model, method, factor=4)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)

    with pytest.raises(RopeError, match=r"saved by Scorer, and LlamaForCausalLM .* random"):
        load_pretrained(tmp_path)
    found = load_pretrained(tmp_path, model_class=Scorer)

    assert type(found) is Scorer
    assert torch.equal(logits(found, ids), expected)


def test_a_classifier_comes_back_as_one(tmp_path, ids):
    torch.manual_seed(0)
    settings = {**tiny_llama().config.to_dict(), "pad_token_id": 0, "num_labels": 3}
    model = LlamaForSequenceClassification(LlamaConfig(**settings)).eval()
    patch_model(model, "dynamic_yarn", factor=4)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)

    found = load_pretrained(tmp_path)

    assert type(found) is LlamaForSequenceClassification
    assert torch.equal(logits(found, ids), expected)


def test_an_adapter_of_a_classifier_finds_the_classifier(tmp_path, ids):
    tiny_llama(pad_token_id=0).save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    patch_model(model, "dynamic_yarn", factor=4)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(model, lora).eval()
    model.save_pretrained(tmp_path / "adapter")

    found = load_pretrained(tmp_path / "adapter", num_labels=3).eval()

    assert torch.equal(logits(found, ids), logits(model, ids))


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_pushed_to_the_hub_holds_the_record(adapted, tmp_path, ids, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = patch_model(load_pretrained(tmp_path / "base"), "dynamic_yarn", factor=4)
    if adapted:
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    repository = SimpleNamespace(repo_id="someone/model")
    api = SimpleNamespace(create_repo=lambda *given, **more: repository)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: card)
    pushed = tmp_path / "pushed"
    model._upload_modified_files = lambda directory, *a, **k: shutil.copytree(directory, pushed)

    model.push_to_hub("someone/model")

    assert torch.equal(logits(load_pretrained(pushed), ids), logits(model, ids))


def test_the_parts_of_a_checkpoint_may_lie_in_a_subfolder(tmp_path, ids):
    model = patch_model(tiny_llama(), "dynamic_yarn", factor=4)
    model.save_pretrained(tmp_path / "part")

    for arguments in ({}, {"config": tiny_llama().config}):  # with a config of its own, or without
        found = load_pretrained(tmp_path, subfolder="part", **arguments)
        assert torch.equal(logits(found, ids), logits(model, ids))


def into_cache(cache, name, directory, revision):
    """Store a directory as the hub's client does what it has downloaded."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(directory, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text(commit)


def test_models_and_adapters_of_the_hub_are_found_in_the_cache_asked_for(tmp_path, ids):
    patch_model(tiny_llama(), "dynamic_yarn", factor=4).save_pretrained(tmp_path / "base")
    base = load_pretrained(tmp_path / "base")
    expected = logits(base, ids)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = {**json.loads(path.read_text()), "base_model_name_or_path": "someone/base"}
    path.write_text(json.dumps(settings))
    cache = tmp_path / "cache"
    into_cache(cache, "someone/base", tmp_path / "base", "main")
    into_cache(cache, "someone/adapter", tmp_path / "adapter", "v1")
    here = {"cache_dir": cache, "local_files_only": True}

    assert torch.equal(logits(load_pretrained("someone/base", **here), ids), expected)
    found = load_pretrained("someone/adapter", revision="v1", **here)
    assert torch.equal(logits(found.eval(), ids), logits(model, ids))
    with pytest.raises(RopeError, match="cannot read a model's config from 'someone/adapter'"):
        load_pretrained("someone/adapter", **here)  # of the main revision there is nothing


@pytest.mark.parametrize("beside", [False, True])
def test_loading_information_comes_with_an_adapter(beside, tmp_path, ids):
    patch_model(tiny_llama(), "dynamic_yarn", factor=4).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load_pretrained(tmp_path / "base"), lora).eval()
    directory = tmp_path / ("base" if beside else "adapter")
    model.save_pretrained(directory)

    found, information = load_pretrained(directory, output_loading_info=True)

    assert torch.equal(logits(found.eval(), ids), logits(model, ids))
    assert not information["mismatched_keys"]


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["MyLlama"], (AutoModelForCausalLM, True)),
        (["Another"], (AutoModel, False)),
        (None, (AutoModel, False)),
    ],
)
def test_remote_code_is_loaded_by_the_auto_class_of_what_was_saved(architectures, expected):
    config = LlamaConfig(architectures=architectures)
    config.auto_map = {"AutoConfig": "m.MyConfig", "AutoModel": "m.MyBase"}
    config.auto_map["AutoModelForCausalLM"] = "m.MyLlama"

    assert find_class(config, trust_remote_code=True) == expected
    assert find_class(config)[0] is not AutoModel  # code is not run unless it is trusted


def test_an_adapter_beside_its_base_is_loaded_onto_that(tmp_path, ids):
    patch_model(tiny_llama(), "dynamic_yarn", factor=4).save_pretrained(tmp_path)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load_pretrained(tmp_path), lora).eval()
    model.save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("method", ["yarn", "ntk", "dynamic_yarn"])
def test_a_patch_is_restored_onto_a_model_that_was_loaded_otherwise(method, tmp_path, ids):
    model = patch_model(tiny_llama(), method, factor=4)
    model.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_pretrained(adapted, tmp_path / "adapter")

    for source in (
        tmp_path / "model",
        str(tmp_path / "model"),
        tmp_path / "adapter",
        model.config,
        model.config.to_dict(),
    ):
        found = tiny_llama()
        assert restore_patch(found, source) is found
        assert restore_patch(found, source) is found  # a second time it is there already
        assert torch.equal(logits(found, ids), logits(adapted, ids))
        assert found.config.hf_rope_ext == model.config.hf_rope_ext
        unpatch_model(found)
        assert torch.equal(logits(found, ids), logits(tiny_llama(), ids))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: tiny_llama({"rope_theta": 5e5}), "unscaled was .*10000.* is .*500000"),
        (lambda: tiny_llama(max_position_embeddings=32), "does not fit this model"),
        (lambda: patch_model(tiny_llama(), "yarn", factor=2), "'factor': 4.* 'factor': 2"),
    ],
)
def test_a_patch_that_does_not_fit_is_not_restored(build, match, tmp_path, ids):
    patch_model(tiny_llama(), "yarn", factor=4).save_pretrained(tmp_path)
    model = build()
    before = logits(model, ids)

    with pytest.raises(RopeError, match=match):
        restore_patch(model, tmp_path)

    assert torch.equal(logits(model, ids), before)


def test_what_holds_no_record_restores_nothing(tmp_path):
    tiny_llama().save_pretrained(tmp_path)

    for source in (tmp_path, tiny_llama().config, {}):
        named = re.escape(str(source)) if source == tmp_path else "the config"
        with pytest.raises(RopeError, match=f"^{named} holds no record"):
            restore_patch(model := tiny_llama(), source)
        with pytest.raises(NotPatchedError):
            unpatch_model(model)


@pytest.mark.parametrize("method", ["yarn", "ntk"])
def test_a_model_that_stock_loaded_scaled_is_not_scaled_twice(method, tmp_path, ids):
    patch_model(tiny_llama(), method, factor=4).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = logits(model, ids)

    with pytest.raises(RopeError, match="load_pretrained"):
        restore_patch(model, tmp_path)

    assert torch.equal(logits(model, ids), before)
