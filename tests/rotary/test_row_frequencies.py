"""Rotary code from before transformers 5.19, which expands one vector over the batch."""

import pytest
import torch
from conftest import relative, tiny_llama
from decoding import dynamic, frozen, step_by_step, text

from hf_rope_ext import planned


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
