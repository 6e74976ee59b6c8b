"""Releases to come: each is served by looking, or refused by the proof, and none is wrong."""

import inspect

import pytest
import torch
from conftest import tiny_llama
from decoding import CACHE, dynamic, step_by_step, text
from transformers import DynamicCache, LlamaModel
from transformers.modeling_outputs import BaseModelOutput

from hf_rope_ext import ProbeError, patch_model, planned, request_plan, unpatch_model
from hf_rope_ext.errors import RopeError
from hf_rope_ext.models import host


def of_class(cls):
    """A tiny llama whose text model has another forward."""
    model = tiny_llama()
    model.model.__class__ = cls
    return model


class RenamedArgument(LlamaModel):
    def forward(self, input_ids=None, memory: DynamicCache | None = None, **kwargs):
        return LlamaModel.forward(self, input_ids, **{**kwargs, CACHE: memory})


class UnknownArgument(LlamaModel):
    """Nothing in its signature says that ``memory`` is a cache."""

    def forward(self, input_ids=None, memory=None, **kwargs):
        return LlamaModel.forward(self, input_ids, **{**kwargs, CACHE: memory})


class HiddenOutput(LlamaModel):
    def forward(self, *args, **kwargs):
        return BaseModelOutput(LlamaModel.forward(self, *args, **kwargs).last_hidden_state)

    forward.__signature__ = inspect.signature(LlamaModel.forward)


class IgnoresCache(LlamaModel):
    """Keeps a cache of its own, which nobody can see."""

    def forward(self, input_ids=None, use_cache=None, **kwargs):
        kwargs[CACHE] = self.__dict__.get("memory")
        output = LlamaModel.forward(self, input_ids, use_cache=use_cache, **kwargs)
        self.__dict__["memory"] = output[CACHE]
        return BaseModelOutput(output.last_hidden_state)


def rows_of_cached_and_full(model, name, length=150):
    ids, cache = text(1, length), DynamicCache(config=model.config)
    with torch.no_grad(), planned(length):
        full = model.model(ids, use_cache=False).last_hidden_state
        parts = [
            model.model(part, use_cache=True, **{name: cache}).last_hidden_state
            for part in (ids[:, :70], *ids[:, 70:].split(1, dim=1))
        ]
    return torch.cat(parts, dim=1), full


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (RenamedArgument, "memory"),
        (HiddenOutput, CACHE),
        (LlamaModel, CACHE),
    ],
)
def test_a_cache_is_found_by_looking(cls, name):
    model = dynamic(model=of_class(cls))

    cached, full = rows_of_cached_and_full(model, name)

    torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [IgnoresCache, UnknownArgument])
def test_a_model_whose_cache_no_plan_reaches_is_refused_and_left_as_it_was(cls):
    model = of_class(cls)
    ids = text(1, 100)
    before = vars(model.model).copy()
    with torch.no_grad():
        expected = LlamaModel.forward(model.model, ids, use_cache=False).last_hidden_state

    with pytest.raises(ProbeError, match=rf"transformers .* \(tested up to {host.LAST_TESTED}\)"):
        dynamic(model=model)

    with torch.no_grad():
        found = LlamaModel.forward(model.model, ids, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
    assert vars(model.model).keys() - {"memory"} == before.keys()
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_a_rotary_embedding_that_ignores_its_frequencies_is_refused():
    model = tiny_llama()
    stock = type(model.model.rotary_emb)

    class OwnRotaryEmbedding(stock):
        def forward(self, x, position_ids):
            own = torch.ones_like(self.original_inv_freq) * position_ids[..., None]
            angles = torch.cat((own, own), dim=-1)
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    model.model.rotary_emb.__class__ = OwnRotaryEmbedding

    with pytest.raises(ProbeError, match="does not compute its frequencies from inv_freq"):
        dynamic(model=model)
    assert isinstance(model.model.rotary_emb, OwnRotaryEmbedding)


def test_generate_that_prepares_its_cache_in_an_unknown_way_is_refused(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), host.PREPARE_CACHE, lambda self, plan: None)

    with pytest.raises(RopeError, match="in an unknown way in transformers"):
        dynamic(model=model)


def test_the_proof_is_silent_and_leaves_no_trace():
    reported = []
    model = tiny_llama().train()

    with torch.random.fork_rng():
        state = torch.get_rng_state()
        patch_model(model, "dynamic_yarn", factor=4, on_plan=reported.append)
        assert torch.equal(torch.get_rng_state(), state)

    assert not reported
    assert all(part.training for part in model.modules())
    assert "plan" not in vars(model.model.rotary_emb)
    unpatch_model(model)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_cache_may_have_the_name_of_any_release(name):
    model, ids = dynamic(), text(1, 120)
    with planned(120):
        expected, _ = step_by_step(model, ids, 100)
    cache = DynamicCache(config=model.config)

    with torch.no_grad(), planned(120):
        parts = [model(part, **{name: cache}) for part in (ids[:, :100], *ids[:, 100:].split(1, 1))]

    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), expected)
    assert request_plan(parts[-1]).lengths.tolist() == [120]
    assert request_plan(cache).lengths.tolist() == [120]
    first = model.generate(text(1, 20), max_new_tokens=4, return_dict_in_generate=True)
    again = model.generate(first.sequences, max_new_tokens=4, **{name: first[CACHE]})
    assert again.shape[1] == first.sequences.shape[1] + 4


def test_two_caches_are_refused():
    model = dynamic()
    other = next(name for name in ("cache", "past_key_values") if name != CACHE)
    caches = {name: DynamicCache(config=model.config) for name in (CACHE, other)}

    with pytest.raises(RopeError, match="names of one argument"):
        host.with_cache_named(caches, CACHE)


def test_the_cache_argument_is_the_one_that_stock_forwards_have():
    assert host.cache_argument(LlamaModel.forward) == CACHE
    assert host.cache_argument(RenamedArgument.forward) == "memory"
    assert host.cache_argument(lambda self, input_ids: None) is None
    assert CACHE in inspect.signature(LlamaModel.forward).parameters
