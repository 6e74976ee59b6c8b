"""Hooks and stand-ins on a model, and what is left of them."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_llama
from decoding import dynamic, greedy, text

from hf_rope_ext import unpatch_model

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")


def test_undoing_leaves_no_hook_and_no_method_behind():
    model = dynamic()
    unpatch_model(model)

    assert not {"generate", "_prepare_cache_for_generation"} & set(vars(model))
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        assert not getattr(model.model, name)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_plans_for_itself(duplicate):
    model = dynamic()
    ids = text(1, 80)
    expected = greedy(model, ids, 40)

    copied = duplicate(model)
    unpatch_model(model)

    assert torch.equal(greedy(copied, ids, 40), expected)
    assert torch.equal(greedy(unpatch_model(copied), ids, 20), greedy(tiny_llama(), ids, 20))
