"""Gradient checkpointing, which runs layers once more in the backward pass."""

from functools import partial

import pytest
import torch
import zoo
from conftest import TRAINED, tiny_llama
from decoding import dynamic, text
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_rope_ext import RopeError, planned

KNOWN = {"original_max_position_embeddings": TRAINED}
pytestmark = pytest.mark.filterwarnings("ignore:.*have a sliding window of")

OLDER = not hasattr(PreTrainedModel, "activation_checkpointing_enable")

# in all but llama, layers hold a rotary embedding each
BUILD = {"llama": tiny_llama, "recurrent_gemma": partial(zoo.build, "recurrent_gemma")}


def gradients(model, length, *, padded=False):
    ids = text(2, 80)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 40:] = 0
    with planned(length) if length else torch.enable_grad():
        scores = model(ids, attention_mask=mask, use_cache=False).logits
    scores[mask.bool()].square().mean().backward()  # outside the block, as in a training loop
    return torch.cat([own.grad.flatten() for own in model.parameters() if own.grad is not None])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [None, 200])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", BUILD)
def test_a_repeated_layer_has_the_plan_of_its_call(family, reentrant, length, padded):
    found = []
    for repeats in (True, False):
        model = dynamic("dynamic_ntk", BUILD[family]().train(), **KNOWN)
        if repeats:
            older = model.gradient_checkpointing_enable if OLDER else None
            enable = older or model.activation_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found.append(gradients(model, length, padded=padded))
    assert (found[0] - found[1]).abs().max() <= 1e-6 * found[1].abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_model_has_the_plan_of_its_call(reentrant):
    found = []
    for repeats in (True, False):
        model, ids = dynamic(model=tiny_llama().train()), text(1, 80)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

        def run(values, model=model):
            return model(inputs_embeds=values, use_cache=False).logits

        with planned(200):
            scores = (
                checkpoint(run, embedded, use_reentrant=reentrant) if repeats else run(embedded)
            )
        scores.square().mean().backward()
        found.append(embedded.grad)
    assert torch.equal(*found)


def test_a_repeated_layer_whose_plan_is_not_known_is_refused():
    model = dynamic(model=zoo.build("kyutai_speech_to_text"), **KNOWN)
    layer = model.model.layers[0]
    states = torch.randn(1, 80, model.config.hidden_size, requires_grad=True)
    places = torch.arange(80)[None]

    def run(values):
        return layer(values, position_ids=places.clone())[0]

    loss = checkpoint(run, states, use_reentrant=True).sum()
    with pytest.raises(RopeError, match=r"Attention is repeated in a backward pass"):
        loss.backward()


def test_a_repeated_model_does_not_get_the_plan_of_an_earlier_call():
    found = []
    for repeats in (True, False):
        model, ids = dynamic(model=tiny_llama().train()), text(1, 80)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with planned(200):
            model(inputs_embeds=embedded, use_cache=False)

        def run(values, model=model):
            return model(inputs_embeds=values, use_cache=False).logits

        scores = checkpoint(run, embedded, use_reentrant=False) if repeats else run(embedded)
        scores.square().mean().backward()
        found.append(embedded.grad)
    assert torch.equal(*found)
