"""Rotary code of older releases, put into a model of the installed one.

Before transformers 5.19 it expands one vector of frequencies over the batch; in 5.16 Qwen2-VL's
leaves it to the attention to take each section from its axis.
"""

import pytest
import torch
import zoo
from conftest import relative, tiny_llama
from decoding import dynamic, frozen, step_by_step, text
from transformers.models.qwen2_vl import modeling_qwen2_vl

from hf_rope_ext import MRopeLayout, patch_model, planned


def with_older_code(model):
    rotary = model.model.rotary_emb

    class OlderRotaryEmbedding(type(rotary)):
        def forward(self, x, position_ids):
            vector = self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1)
            vector = vector.to(dtype=torch.float, device=x.device)
            freqs = (vector @ position_ids[:, None, :].float()).transpose(1, 2)
            emb = torch.cat((freqs, freqs), dim=-1)
            cos = emb.cos() * self.attention_scaling
            sin = emb.sin() * self.attention_scaling
            return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)

    rotary.__class__ = OlderRotaryEmbedding
    return model


@pytest.mark.parametrize("method", ["dynamic_yarn", "dynamic_ntk"])
def test_each_row_has_the_plan_of_its_own_length(method):
    model = dynamic(method, model=with_older_code(tiny_llama()))
    ids = text(2, 150)
    positions = torch.stack([torch.arange(150), torch.arange(150).clamp(max=79)])
    mask = torch.ones(2, 1, 150, 150, dtype=torch.bool).tril()

    with torch.no_grad():
        found = model(ids, position_ids=positions, attention_mask=mask).logits

    assert not model.model.rotary_emb.takes_rows
    for row, length in enumerate((150, 80)):
        with torch.no_grad():
            alone = frozen(method, length)(ids[row : row + 1, :80]).logits
        assert relative(found[row, :80], alone[0]) < 1e-5


def test_a_cached_loop_equals_the_full_forward_and_todays_code():
    ids = text(2, 120)
    with planned(120), torch.no_grad():
        found, _ = step_by_step(dynamic(model=with_older_code(tiny_llama())), ids, 40)
        expected = dynamic()(ids).logits

    assert relative(found, expected) < 1e-5


def with_axes_left_to_attention(model, monkeypatch):
    """The rotary embedding and the attention of Qwen2-VL in transformers 5.16."""
    section = model.config.rope_parameters["mrope_section"]
    rotary, apply = model.rotary_emb, modeling_qwen2_vl.apply_rotary_pos_emb

    class OlderRotaryEmbedding(type(rotary)):
        def forward(self, x, position_ids):
            vector = self.inv_freq[None, None, :, None].float()
            vector = vector.expand(3, position_ids.shape[1], -1, 1)
            freqs = (vector @ position_ids[:, :, None, :].float()).transpose(2, 3)
            emb = torch.cat((freqs, freqs), dim=-1)
            return emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling

    def take_axes(q, k, cos, sin, **arguments):
        def take(parts):
            parts = parts.split(section * 2, dim=-1)
            return torch.cat([part[turn % 3] for turn, part in enumerate(parts)], dim=-1)

        return apply(q, k, take(cos), take(sin), **arguments)

    rotary.__class__ = OlderRotaryEmbedding
    del rotary.mrope_section
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb", take_axes)
    return model


@pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")
@pytest.mark.parametrize(
    "how",
    [
        {"method": "yarn"},
        {"method": {"t": "yarn", "h": "linear"}},
        {"method": {"t": "dynamic_yarn"}},
        {"method": "linear", "mrope_layout": "interleaved"},
        {"method": "dynamic_yarn", "mrope_layout": "interleaved"},
        {"method": "dynamic_yarn", "mrope_layout": MRopeLayout("mhrope", (0, 1, 1))},
    ],
    ids=str,
)
def test_axes_that_the_attention_takes_apart_are_those_of_todays_code(how, monkeypatch):
    ids = text(2, 40)
    positions = torch.randint(0, 90, (3, 2, 40), generator=torch.Generator().manual_seed(1))
    model, older = zoo.build("qwen2_vl_text"), zoo.build("qwen2_vl_text")
    with torch.no_grad():
        expected = patch_model(model, factor=4, **how)(ids, position_ids=positions)
        patch_model(with_axes_left_to_attention(older, monkeypatch), factor=4, **how)
        found = older(ids, position_ids=positions)

    difference = relative(found.last_hidden_state, expected.last_hidden_state)
    assert difference < 1e-5
