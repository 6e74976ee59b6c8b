"""A model whose own config already scales it: what it was trained with."""

import pytest
import torch
from conftest import logits, tiny_llama

from hf_rope_ext import patch_model

TRAINED, EXTENDED = 16, 64
OWN = {
    "yarn": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


@pytest.mark.parametrize("rope_type", OWN)
@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn"])
def test_replacing_a_scaling_starts_from_the_length_before_it(rope_type, method, ids):
    """As Llama 3.1: trained at 8,192, `max_position_embeddings` of 131,072."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": TRAINED, **OWN[rope_type]}
    scaled = tiny_llama({"rope_type": rope_type, **scaling}, max_position_embeddings=EXTENDED)
    unscaled = tiny_llama(max_position_embeddings=TRAINED)

    patch_model(scaled, method, factor=8, replace=True)
    patch_model(unscaled, method, factor=8)

    assert torch.equal(logits(scaled, ids), logits(unscaled, ids))
