"""Cached keys that are turned to a longer plan."""

from contextlib import nullcontext

import pytest
import torch
import zoo
from conftest import relative
from decoding import CACHE, FAMILIES, dynamic, step_by_step, text, vision_language_inputs
from method_knobs import PER_REQUEST, knobs

from hf_rope_ext import patch_model, planned, request_plan
from hf_rope_ext.models.sites import read_sites

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")


@pytest.mark.parametrize("method", PER_REQUEST)
@pytest.mark.parametrize("family", FAMILIES)
def test_rerotated_keys_are_those_of_the_longer_plan(family, method):
    model = zoo.build(family)
    trained = read_sites(model)[0].geometry.original_max_position_embeddings
    patch_model(model, method, **knobs(method, read_sites(model)[0].geometry.pairs))
    ids = text(2, trained + 12)
    _, grown = step_by_step(model, ids, trained + 9)  # beyond, so that the first step grows it
    capacity = int(request_plan(grown).lengths.max())
    with planned(capacity):
        _, expected = step_by_step(model, ids, trained + 9)

    assert capacity > trained + 12
    held = zip(grown.layers, expected.layers, strict=True)
    first = next(pair for pair in held if isinstance(getattr(pair[0], "keys", None), torch.Tensor))
    for part in ("keys", "values"):
        found, wanted = (getattr(layer, part) for layer in first)
        assert relative(found, wanted) < 1e-4


def test_rerotation_turns_each_row_and_its_padding_by_their_own_positions():
    model = dynamic()
    batch, mask = text(2, 100), torch.ones(2, 100, dtype=torch.int64)
    mask[1, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = []
    for length in (None, 300):
        with torch.no_grad(), planned(length) if length else nullcontext():
            out = model(batch, attention_mask=mask, position_ids=positions, use_cache=True)
            more = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            cache = out[CACHE]
            last = torch.tensor([[100], [30]])
            grown = model(text(2, 1), attention_mask=more, position_ids=last, **{CACHE: cache})
            caches.append(grown[CACHE])
    found, wanted = caches

    assert request_plan(found).lengths.tolist() == [104, 64]
    assert request_plan(wanted).lengths.tolist() == [300, 230]
    again = dynamic()
    with planned(104), torch.no_grad():
        out = again(batch, attention_mask=mask, position_ids=positions, use_cache=True)
    assert relative(found.layers[0].keys[:, :, :100], out[CACHE].layers[0].keys) < 1e-5


def test_rerotation_turns_an_image_by_its_own_axes():
    grown, expected = [], []
    for capacity, kept in ((None, grown), (83, expected)):
        model = zoo.build("qwen2_vl")
        inputs = vision_language_inputs(model, words=60)
        patch_model(model, "dynamic_yarn", factor=4)
        with torch.no_grad(), planned(capacity) if capacity else nullcontext():
            cache = model(**inputs, use_cache=True)[CACHE]
            model(text(1, 1), **{CACHE: cache})
        kept.append(cache)
    (found,), (wanted,) = grown, expected

    assert request_plan(found).lengths.tolist() == request_plan(wanted).lengths.tolist() == [71]
    assert relative(found.layers[0].keys, wanted.layers[0].keys) < 1e-5


def test_a_cache_that_was_cut_back_grows_by_the_positions_it_still_holds():
    ids, caches = text(1, 110), []
    for capacity in (None, 114):
        model = dynamic()
        with torch.no_grad(), planned(capacity) if capacity else nullcontext():
            cache = model(ids[:, :100], use_cache=True)[CACHE]
            cache.crop(-30)
            model(ids[:, 70:], **{CACHE: cache})
        caches.append(cache)
    found, wanted = caches

    assert request_plan(found).lengths.tolist() == request_plan(wanted).lengths.tolist() == [114]
    assert relative(found.layers[0].keys, wanted.layers[0].keys) < 1e-5
