"""Gradients under attention-side methods, and the numbers that training runs in."""

import copy
import gc
import weakref

import pytest
import torch
from attention.rules import model_of, tokens

from hf_rope_ext import patch_model
from hf_rope_ext.attention import kernels
from hf_rope_ext.attention.turning import Turn
from hf_rope_ext.attention.view import Part, View

METHODS = {
    "leaky_rerope": {"window": 10, "slowdown": 3.5},
    "dca": {"chunk": 16, "limit": 24},
    "streaming": {"sinks": 3, "window": 12},
}


def trained(family, name, **own):
    """A copy of a family's model that trains, patched."""
    model = copy.deepcopy(model_of(family)).train()
    return patch_model(model, name, **own)


def gradients(model, ids, mask):
    model.zero_grad()
    loss = model(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False
    ).loss
    loss.backward()
    return loss.detach(), {name: own.grad for name, own in model.named_parameters()}


def batch():
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    return ids, mask


def checkpointed(model, **settings):
    older = not hasattr(model, "activation_checkpointing_enable")
    enable = model.gradient_checkpointing_enable if older else model.activation_checkpointing_enable
    enable(settings)
    model.enable_input_require_grads()


def same(found, expected, most=2e-4):
    for name, own in expected.items():
        if own is None:
            assert found[name] is None
            continue
        assert found[name].isfinite().all(), name
        assert (found[name] - own).norm() <= most * own.norm() + 1e-6, name


def dense(view, query, key, value, scaling):
    """Attention over the parts of a view by plain operations on whole matrices."""
    groups = query.shape[1] // key.shape[1]
    rows, keys = slice(0, query.shape[2]), slice(0, key.shape[2])
    scores = query.new_full((1,), -torch.inf)
    for part in view.parts:
        q = query if part.query is None else part.query(query)
        k = (key if part.key is None else part.key(key)).repeat_interleave(groups, 1)
        scores = torch.where(view.allowed(part, rows, keys), q @ k.mT * scaling, scores)
    return scores.softmax(-1) @ value.repeat_interleave(groups, 1)


def made_view(count, window, width):
    """A near and a far band of random turns, the far one with turned keys."""
    places = torch.arange(count)[None]
    edge = (places - (window - 1)).clamp(min=0)
    quarter = torch.zeros(width, width)
    half = width // 2
    quarter[torch.arange(half) + half, torch.arange(half)] = -1.0
    quarter[torch.arange(half), torch.arange(half) + half] = 1.0

    def turn():
        angles = torch.rand(1, 1, count, half) * 6
        return Turn(torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1), quarter)

    parts = [Part(edge, places + 1), Part(0 * edge, edge, None, turn(), turn())]
    return View(parts, None, None, None, places.double(), places.double())


@pytest.mark.parametrize("block", [16, 64, 512])
@pytest.mark.parametrize(("heads", "kv_heads", "value_dim"), [(4, 4, 8), (6, 2, 8), (2, 1, 4)])
def test_merged_bands_have_the_gradient_of_one_softmax(
    monkeypatch, heads, kv_heads, value_dim, block
):
    monkeypatch.setattr(kernels, "BLOCK", block)
    count, width = 100, 8
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_dim)]
    inputs = [torch.randn(2, own, count, dims, requires_grad=True) for own, dims in shapes]
    weight = torch.randn(2, heads, count, value_dim)
    view = made_view(count, 30, width)

    found = kernels.attend(view, *inputs, scaling=0.7)
    expected = dense(view, *inputs, 0.7)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_gradients_are_those_of_scores_written_out_and_padding_has_none(monkeypatch, family, name):
    ids, mask = batch()
    model = trained(family, name, **METHODS[name])
    loss, found = gradients(model, ids, mask)
    monkeypatch.setattr(kernels, "_has_kernel", lambda *states: False)
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", 2**13)  # more than one block
    expected_loss, expected = gradients(model, ids, mask)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    same(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*METHODS, "leaky_rerope+logn"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_checkpointed_layers_have_the_same_gradients(family, name, reentrant):
    ids, mask = batch()
    model = trained(family, name, **METHODS.get(name, {}))
    loss, expected = gradients(model, ids, mask)
    checkpointed(model, use_reentrant=reentrant)

    again, found = gradients(model, ids, mask)

    torch.testing.assert_close(again, loss)
    same(found, expected, 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_as_near_to_float32_as_without_a_method(name):
    ids = tokens()

    def error(model):
        exact = model(input_ids=ids, use_cache=False).logits
        rough = copy.deepcopy(model).to(torch.bfloat16)(input_ids=ids, use_cache=False).logits
        return float((rough.float() - exact).norm() / exact.norm())

    with torch.no_grad():
        plain = error(model_of("llama"))
        model = patch_model(copy.deepcopy(model_of("llama")), name, **METHODS[name])
        assert error(model) < 1.5 * plain


def test_dropout_drops():
    model = trained("llama", "leaky_rerope", **METHODS["leaky_rerope"])
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    ids, mask = batch()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_a_mask_of_four_dimensions_does_not_outlive_its_call():
    model = trained("llama", "dca", **METHODS["dca"])
    checkpointed(model, use_reentrant=False)
    ids, _ = batch()
    mask = torch.ones(2, 1, 90, 90, dtype=torch.bool).tril()
    held = weakref.ref(mask)
    model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    del mask
    gc.collect()
    assert held() is None
