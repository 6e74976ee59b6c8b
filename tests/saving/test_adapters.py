"""Adapters of patched models."""

import pytest
import torch
from conftest import logits, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model

from hf_rope_ext import (
    RopeError,
    load_pretrained,
    patch_model,
    save_pretrained,
)


def test_a_saved_adapter_brings_its_rope_along(ids, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    patched = patch_model(load_pretrained(tmp_path / "base"), "dynamic_yarn", factor=4)
    model = get_peft_model(
        patched, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    expected = logits(model, ids)

    save_pretrained(model, tmp_path / "adapter")
    loaded = load_pretrained(tmp_path / "adapter")

    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded, ids), expected)


def test_an_adapter_on_a_base_that_was_patched_otherwise_is_refused(tmp_path):
    for name, factor in (("base", 2), ("trained", 4)):
        patch_model(tiny_llama(), "yarn", factor=factor).save_pretrained(tmp_path / name)
    model = get_peft_model(
        load_pretrained(tmp_path / "trained"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    save_pretrained(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(tmp_path / "trained"), str(tmp_path / "base")))

    with pytest.raises(RopeError, match=r"method was .*4\.0.* in training and is .*2\.0"):
        load_pretrained(tmp_path / "adapter")
