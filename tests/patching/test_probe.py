"""A patch that does not take effect is not left in silence."""

import pytest
import torch
import zoo
from conftest import logits, tiny_llama
from torch import nn
from transformers.models.llama import modeling_llama

from hf_rope_ext import ProbeError, RopeWarning, patch_model


class Fused(nn.Module):
    """Attention with sines and cosines of its own, like a fused kernel's."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.table = modeling_llama.LlamaRotaryEmbedding(attention.config)

    def forward(self, hidden_states, position_embeddings=None, position_ids=None, **arguments):
        own = self.table(hidden_states, position_ids)
        return self.attention(hidden_states, position_embeddings=own, **arguments)


def fuse(model):
    for layer in model.model.layers:
        layer.self_attn = Fused(layer.self_attn)
    return model


def test_attention_that_ignores_the_rotary_embedding_is_found_out_and_nothing_changes(ids):
    model = fuse(tiny_llama())
    # the kernel's own copy is no part of the model's text RoPE: hide it as a fused table would be
    for layer in model.model.layers:
        layer.self_attn.__dict__["table"] = layer.self_attn._modules.pop("table")
    before, rotary, config = logits(model, ids), model.model.rotary_emb, model.config.to_dict()

    with pytest.raises(ProbeError, match="does not use its rotary embedding"):
        patch_model(model, "yarn", factor=4)

    assert model.model.rotary_emb is rotary
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, ids), before)
    patch_model(model, "yarn", factor=4, probe=False)


class DeafRotaryEmbedding(modeling_llama.LlamaRotaryEmbedding):
    """Computes with numbers of its own."""

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * 10000.0 ** (-torch.arange(8) / 8)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def test_a_rotary_module_that_ignores_its_buffer_is_found_out(llama):
    llama.model.rotary_emb = DeafRotaryEmbedding(llama.config)

    with pytest.raises(
        ProbeError, match="DeafRotaryEmbedding does not rotate by the planned angles"
    ):
        patch_model(llama, "ntk", factor=4)

    assert isinstance(llama.model.rotary_emb, DeafRotaryEmbedding)


class Unrunnable(nn.Module):
    def forward(self, *arguments, **more):
        raise OSError("weights are on a disk that is gone")


def test_a_model_that_does_not_run_cannot_be_proven_and_the_reason_is_given(llama):
    llama.model.embed_tokens = Unrunnable()

    with pytest.raises(ProbeError, match=r"a disk that is gone.*probe=False"):
        patch_model(llama, "yarn", factor=4)

    assert type(llama.model.rotary_emb) is modeling_llama.LlamaRotaryEmbedding


def test_it_leaves_the_random_state_and_the_training_mode_alone(llama):
    llama.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()

    patch_model(llama, "yarn", factor=4)

    assert torch.equal(torch.get_rng_state(), state)
    assert llama.training


BROKEN = {
    "cast": (lambda buffer: buffer.bfloat16(), "cast to bfloat16"),
    "rounded": (lambda buffer: buffer.bfloat16().float(), "did not follow from the config"),
    "zeros": (lambda buffer: buffer * 0, "held only zeros or"),
    "nan": (lambda buffer: buffer * torch.nan, "held only zeros or"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_spoilt_buffer_is_rebuilt_from_the_config_and_never_scaled(fault, llama, ids):
    spoil, reason = BROKEN[fault]
    llama.model.rotary_emb.inv_freq = spoil(llama.model.rotary_emb.inv_freq)

    with pytest.warns(RopeWarning, match=f"rebuilt from the config, because it .*{reason[-12:]}"):
        patch_model(llama, "yarn", factor=4)

    sound = patch_model(tiny_llama(), "yarn", factor=4)
    assert torch.equal(llama.model.rotary_emb.inv_freq, sound.model.rotary_emb.inv_freq)
    assert torch.equal(logits(llama, ids), logits(sound, ids))


def test_a_family_whose_formula_is_not_known_is_refused(llama):
    class Odd(modeling_llama.LlamaRotaryEmbedding):
        @staticmethod
        def compute_default_rope_parameters(config, *device, **arguments):
            return 1.0 / (1.0 + torch.arange(8.0)), 1.0

    rotary = Odd(llama.config)
    type(rotary).__name__ = "OddRotaryEmbedding"
    llama.model.rotary_emb = rotary

    with pytest.raises(ValueError, match="in a way this package does not know"):
        patch_model(llama, "yarn", factor=4)


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize("model_type", ["qwen3_next", "jetmoe", "moshi", "gptj", "t5gemma"])
def test_it_finds_the_first_attention_that_rotates_wherever_it_is(model_type):
    patch_model(zoo.build(model_type), "yarn", factor=4)
