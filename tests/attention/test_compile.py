"""Compiled models under attention-side methods compute what they compute without the compiler."""

import pytest
import torch
from conftest import relative, tiny_llama
from decoding import CACHE, step_by_step, text
from transformers import StaticCache

from hf_rope_ext import patch_model, planned

pytestmark = pytest.mark.sweep
METHODS = {
    "leaky_rerope": {"window": 10, "slowdown": 3.5},
    "leaky_rerope+logn": {},
    "dca": {},
    "streaming": {"sinks": 3, "window": 12},
    "alibi": {},
    "xpos": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_compiles_whole(name):
    torch._dynamo.reset()
    model = patch_model(tiny_llama(), name, **METHODS[name])
    ids, mask = text(2, 100), torch.ones(2, 100, dtype=torch.int64)
    mask[1, :30] = 0
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = whole(ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert relative(found[mask.bool()], expected[mask.bool()]) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_the_decode_step_compiles_whole_and_does_not_compile_again_as_it_grows(name):
    torch._dynamo.reset()
    model, ids = patch_model(tiny_llama(), name, **METHODS[name]), text(1, 110)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def cache():
        return StaticCache(config=model.config, max_cache_len=130)

    with planned(110):
        expected, _ = step_by_step(model, ids, 40, cache())
        step, held = torch.compile(model, fullgraph=True, backend=backend), cache()
        with torch.no_grad():
            model(ids[:, :40], **{CACHE: held})
            found = [
                step(ids[:, at : at + 1], **{CACHE: held}, position_ids=torch.tensor([[at]])).logits
                for at in range(40, 110)
            ]
    assert len(graphs) <= 2
    assert relative(torch.cat(found, dim=1), expected[:, 40:]) < 1e-5
