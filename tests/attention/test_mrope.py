"""Images under attention-side methods: one moves as a whole, by the position of its time axis."""

import math

import pytest
import torch
import zoo
from attention.brute_force import as_complex, registered
from attention.rules import TRUE, chunked, grouped, leaky, streaming
from decoding import CACHE
from zoo_images import image_inputs

from hf_rope_ext import patched

RULES = {
    "leaky_rerope": ({"window": 10, "slowdown": 3.5}, leaky(10, 3.5)),
    "self_extend": ({"group": 3, "window": 10}, grouped(3, 10)),
    "dca": ({"chunk": 16, "limit": 24}, chunked(16, 24)),
    "streaming": ({"sinks": 3, "window": 12}, streaming(3, 12)),
}


# the axis of each pair, as the papers lay them out: in sections, or interleaved
LAYOUTS = {"qwen2_vl": "tthhhwww", "qwen2_5_vl": "tthhhwww", "qwen3_vl": "thwthwtt"}


def positions_of(model, inputs):
    """The positions that the model gives its tokens, ``(3, batch, seq)``."""
    seen = []
    rotary = model.model.language_model.rotary_emb
    handle = rotary.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return seen[0]


def definition(model, rule, inputs):
    """Logits with every pair of tokens at a distance of its own, on each axis."""
    places = positions_of(model, inputs)
    axes = torch.tensor(["thw".index(axis) for axis in LAYOUTS[model.config.model_type]])
    text = model.config.get_text_config()
    pairs = len(axes)
    frequencies = text.rope_parameters["rope_theta"] ** -(torch.arange(pairs).double() / pairs)
    rows, count = places.shape[1:]
    shift = torch.zeros(rows, count, count, dtype=torch.float64)
    sees = torch.zeros(rows, count, count, dtype=torch.bool)
    for row in range(rows):
        times = places[0, row].tolist()
        for i, m in enumerate(times):
            for j, n in enumerate(times[: i + 1]):
                found = rule.distance(m, n)
                if found is not None:
                    shift[row, i, j], sees[row, i, j] = found - (m - n), True
    true = (places[..., :, None] - places[..., None, :]).double()
    angles = (true[axes] + shift).movedim(0, -1) * frequencies

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, k = (as_complex(one.double(), interleaved=False) for one in (query, key))
        turned = torch.polar(torch.ones(()).double(), angles)
        scores = torch.einsum("bhmp,bhnp,bmnp->bhmn", q, k.conj(), turned).real * scaling
        weights = scores.masked_fill(~sees[:, None], -math.inf).softmax(-1)
        return (weights @ value.double()).to(value.dtype).transpose(1, 2), None

    own = model.model.language_model
    still = {**inputs, "position_ids": torch.zeros_like(places)}
    with registered(own, attention), torch.no_grad():
        return model(**still, use_cache=False).logits


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def vision_language(request):
    model = zoo.build(request.param).eval()
    return model, image_inputs(model, words=50)


def test_the_oracle_at_true_distances_is_the_unpatched_model(vision_language):
    model, inputs = vision_language
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    found = definition(model, TRUE, inputs)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", RULES)
def test_an_image_moves_as_a_whole(vision_language, name):
    model, inputs = vision_language
    own, rule = RULES[name]
    expected = definition(model, rule, inputs)
    with patched(model, name, **own), torch.no_grad():
        found = model(**inputs, use_cache=False).logits
        plain = model(**inputs, use_cache=True)
        more = torch.tensor([[11, 12, 13]])
        goes_on = model(input_ids=more, **{CACHE: plain[CACHE]}).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    longer = {**inputs, "input_ids": torch.cat((inputs["input_ids"], more), 1)}
    for kind in ("mm_token_type_ids", "attention_mask"):
        if kind in longer:
            same = torch.full_like(longer[kind][:, :1], kind == "attention_mask").expand(-1, 3)
            longer[kind] = torch.cat((longer[kind], same), 1)
    expected = definition(model, rule, longer)[:, -3:]
    assert (goes_on - expected).abs().max() < 1e-4 * expected.abs().max()
