"""Adapters of patched models: whoever saves one, the RoPE goes along."""

import copy
import gc
import json
import pickle
import shutil
import weakref

import pytest
import torch
import tuning
from conftest import logits, tiny_llama
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers.integrations import peft as peft_integration

from hf_rope_ext import (
    RopeError,
    RopeWarning,
    load_pretrained,
    patch_model,
    patched,
    save_pretrained,
    unpatch_model,
)
from hf_rope_ext.finetune import load_adapter
from hf_rope_ext.patching.adapter_record import ADAPTER_RECORD, WAITING, weights_record

FAST = {"IA3", "PREFIX_TUNING", "LORA with biases", "LORA with a head", "LORA from PiSSA"}
SAVERS = {
    "PEFT": lambda model, directory: model.save_pretrained(directory),
    "Trainer": tuning.save_by_trainer,
    "this package": save_pretrained,
}
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tuning.base().save_pretrained(directory)
    return directory


def lora(model, **settings):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{**LORA, **settings})).eval()


def extended(directory, method="dynamic_yarn", factor=4):
    return patch_model(load_pretrained(directory), method, factor=factor)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
# PEFT passes prefixes by the name that transformers 5.24 deprecates
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in FAST else [pytest.mark.slow]) for kind in tuning.KINDS],
)
def test_every_type_of_adapter_comes_back_whoever_saved_it(kind, base, tmp_path):
    ids = torch.randint(10, 128, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    model = get_peft_model(extended(base, "yarn"), tuning.config(kind))
    tuning.train(kind, model, ids)

    def run(one):
        with torch.no_grad():
            return tuning.call(kind, one, ids).logits

    expected = run(model)
    for name, save in SAVERS.items():
        save(model, tmp_path / name)
        for found in (
            load_pretrained(tmp_path / name),
            load_adapter(load_pretrained(base), tmp_path / name),
        ):
            assert torch.equal(run(found.eval()), expected), name


def test_the_order_of_patch_and_adapter_does_not_matter(base, tmp_path, ids):
    wrapped_after = lora(extended(base))
    wrapped_before = patch_model(lora(load_pretrained(base)), "dynamic_yarn", factor=4)

    for number, model in enumerate((wrapped_after, wrapped_before)):
        model.save_pretrained(tmp_path / str(number))
        found = load_pretrained(tmp_path / str(number))
        assert torch.equal(logits(found, ids), logits(model, ids))


def test_transformers_own_adapters_bring_it_along_too(base, tmp_path, ids, monkeypatch):
    # transformers 5.24 asks for PEFT 0.22, with which it shares no more than with 0.21 here
    monkeypatch.setattr(peft_integration, "check_peft_version", lambda **versions: None)
    model = extended(base)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(**LORA))

    model.save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model.eval(), ids))


def test_every_adapter_of_a_model_has_its_record(base, tmp_path, ids):
    model = lora(extended(base))
    model.add_adapter("other", LoraConfig(**{**LORA, "target_modules": ["v_proj"]}))
    model.set_adapter("other")

    model.save_pretrained(tmp_path, selected_adapters=["other"])

    assert not (tmp_path / ADAPTER_RECORD).exists()
    assert torch.equal(logits(load_pretrained(tmp_path / "other"), ids), logits(model.eval(), ids))


def test_stock_peft_tells_that_it_does_not_know_the_rope(base, tmp_path, ids):
    lora(extended(base)).save_pretrained(tmp_path)

    for load in (
        lambda: PeftModel.from_pretrained(tuning.base(), tmp_path),
        lambda: tuning.base().load_adapter(str(tmp_path)),
    ):
        with pytest.warns(UserWarning, match=r"load it with hf_rope_ext\.load_pretrained"):
            load()


def test_a_record_that_was_left_behind_is_an_error(base, tmp_path):
    lora(extended(base)).save_pretrained(tmp_path)
    (tmp_path / ADAPTER_RECORD).unlink()

    with pytest.raises(RopeError, match=r"its record hf_rope_ext\.json is missing"):
        load_pretrained(tmp_path)
    with pytest.raises(RopeError, match=r"its record hf_rope_ext\.json is missing"):
        load_adapter(tuning.base(), tmp_path)


def test_an_unpatched_model_saves_as_before(base, tmp_path):
    lora(load_pretrained(base)).save_pretrained(tmp_path / "never")
    model = lora(extended(base))
    unpatch_model(model)
    model.save_pretrained(tmp_path / "unpatched")

    for directory in tmp_path.iterdir():
        assert {path.name for path in directory.iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
        settings = json.loads((directory / "adapter_config.json").read_text())
        assert not any("hf_rope_ext" in key for key in settings)


def stand_ins(model):
    return [part for part in model.modules() if "save_pretrained" in vars(part)]


def waits(model):
    return any(change.model is part for change in WAITING for part in model.modules())


@pytest.mark.parametrize("wrap", [lora, lambda model: get_peft_model(
    model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
)])  # fmt: skip
def test_nothing_is_left_of_the_stand_ins(wrap, base):
    model = wrap(extended(base))

    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert one in stand_ins(one)
        assert waits(one)
        unpatch_model(one)
        assert not stand_ins(one)
        assert not waits(one)


def test_a_block_gives_back_the_stand_ins_of_the_patch_before_it(base, tmp_path, ids):
    model = lora(extended(base))
    before = stand_ins(model)

    with patched(model, "linear", factor=2, replace=True):
        assert stand_ins(model) == before

    assert stand_ins(model) == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model, ids))


def test_a_patched_model_that_is_dropped_is_not_kept(base):
    model = extended(base)
    alive = weakref.ref(model)
    assert waits(model)

    del model
    gc.collect()

    assert alive() is None


def test_a_model_patched_inside_its_wrapper_says_what_is_lost(base):
    model = lora(load_pretrained(base))

    with pytest.warns(RopeWarning, match="patch the PEFT model instead"):
        patch_model(model.get_base_model(), "linear", factor=4)


def test_wrappers_of_other_models_are_left_alone(base):
    waiting = extended(base)
    other = lora(tuning.base())

    assert waits(waiting)
    assert not stand_ins(other)


def test_a_copy_waits_for_wrappers_of_its_own(base, tmp_path, ids):
    original = extended(base)
    copied = copy.deepcopy(original)
    unpatch_model(original)

    model = lora(copied)
    model.save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model, ids))


def test_a_wrapper_that_saves_what_is_inside_goes_on_doing_so(base, tmp_path, ids):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def save_pretrained(self, *args, **kwargs):
            return self.inner.save_pretrained(*args, **kwargs)

    model = lora(extended(base))
    Wrapper(model).save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model, ids))


def test_a_merged_model_keeps_patch_and_record(base, tmp_path, ids):
    model = lora(extended(base))
    expected = logits(model, ids)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)

    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(merged, ids))
    assert not (tmp_path / ADAPTER_RECORD).exists()


def test_one_other_number_anywhere_in_the_base_is_noticed():
    model = tiny_llama(vocab_size=1000)  # an embedding of 64,000 numbers
    before = weights_record(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[-1, -1] += 1e-3

    assert weights_record(model) != before
    assert weights_record(lora(model)) == weights_record(model)


def test_weights_that_are_no_longer_those_of_the_base_have_no_fingerprint():
    with torch.device("meta"):
        assert weights_record(tiny_llama()) is None
    for weight in (torch.ones(128, 64, dtype=torch.int8), torch.empty(0)):  # quantized, sharded
        model = tiny_llama()
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        assert weights_record(model) is None


def test_a_record_that_says_nothing_of_the_weights_is_applied_to_any(base, tmp_path, ids):
    model = lora(extended(base))
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / ADAPTER_RECORD).read_text())
    del record["base_weights"]
    (tmp_path / ADAPTER_RECORD).write_text(json.dumps(record))

    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(model, ids))


def test_an_adapter_on_a_base_that_was_patched_otherwise_is_refused(tmp_path):
    for name, factor in (("base", 2), ("trained", 4)):
        patch_model(tiny_llama(), "yarn", factor=factor).save_pretrained(tmp_path / name)
    lora(load_pretrained(tmp_path / "trained")).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "trained")
    (tmp_path / "base").rename(tmp_path / "trained")

    with pytest.raises(RopeError, match=r"method was .*4\.0.* in training and is .*2\.0"):
        load_pretrained(tmp_path / "adapter")
