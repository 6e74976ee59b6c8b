"""The policy of length-dependent methods, and the plan of a request."""

import pytest
import torch
from conftest import TRAINED, logits, relative, tiny_llama
from decoding import dynamic, frozen, greedy, text
from method_knobs import slowdowns

from hf_rope_ext import MethodParameterError, load_pretrained, patch_model, request_plan

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")


def test_buckets_round_the_planned_length_up():
    model = dynamic(buckets=2)
    found = greedy(model, text(1, 70), 20, return_dict_in_generate=True)

    assert request_plan(found).lengths.tolist() == [128]
    assert torch.equal(found.sequences, greedy(frozen("dynamic_yarn", 128), text(1, 70), 20))
    assert torch.equal(logits(model, text(1, 60)), logits(tiny_llama(), text(1, 60)))


def test_a_length_that_is_a_bucket_stays_in_it():
    model = dynamic("dynamic", buckets=1.25)
    for power in range(12):
        length = torch.tensor([[[TRAINED * 1.25**power]]], dtype=torch.float64)
        policy = model.model.rotary_emb.rotations[None].policy
        assert policy.round_up(length, TRAINED).item() == pytest.approx(length.item(), rel=1e-12)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": slowdowns(8),
            "original_max_position_embeddings": TRAINED,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_stock_behaviour_can_be_had_on_purpose(rope):
    knobs = {key: rope[key] for key in rope if key in ("factor", "short_factor", "long_factor")}
    model = patch_model(tiny_llama(), rope["rope_type"], compat="transformers", **knobs)
    stock = tiny_llama(rope)

    for length in (200, 100, 40, 90, 64, 30):  # what it remembers included
        ids = text(2, length)
        assert relative(logits(model, ids), logits(stock, ids)) < 1e-4
    assert torch.equal(greedy(model, text(1, 50), 60), greedy(stock, text(1, 50), 60))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_growth": "ignore"}, "on_growth must be one of 'rerotate', 'error', 'freeze'"),
        ({"buckets": 1.0}, "buckets must be a finite number greater than 1"),
        ({"buckets": "2"}, "buckets must be a finite number greater than 1"),
        ({"compat": "vllm"}, "compat must be one of None, 'transformers'"),
        ({"on_plan": 3}, "on_plan must be a function"),
        ({"compat": "transformers", "on_growth": "error"}, "on_growth has no effect with compat"),
        ({"compat": "transformers", "buckets": 2}, "buckets has no effect with compat"),
    ],
)
def test_a_wrong_policy_is_refused_before_anything_changes(settings, message):
    model = tiny_llama()

    with pytest.raises(MethodParameterError, match=message):
        dynamic(model=model, **settings)

    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"
    assert "generate" not in vars(model)


def test_a_static_method_has_no_policy():
    with pytest.raises(MethodParameterError, match="on_growth is for methods that follow"):
        patch_model(tiny_llama(), "yarn", factor=4, on_growth="error")


def test_the_policy_is_saved_and_restored(tmp_path):
    dynamic(buckets=2, on_growth="freeze").save_pretrained(tmp_path)

    policy = load_pretrained(tmp_path).model.rotary_emb.rotations[None].policy

    assert (policy.buckets, policy.on_growth) == (2, "freeze")
    dynamic(compat="transformers").save_pretrained(tmp_path)
    again = load_pretrained(tmp_path).model.rotary_emb.rotations[None].policy
    assert again.compat == "transformers"
