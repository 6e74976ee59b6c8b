"""A patch of the attention is a patch like any other: undone, copied, saved, refused whole."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import zoo
from conftest import logits, tiny_llama
from method_knobs import ATTENTION_METHODS, knobs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_rope_ext import (
    RopeError,
    UnsupportedModelError,
    describe,
    export,
    load_pretrained,
    patch_model,
    patched,
    unpatch_model,
)
from hf_rope_ext.attention.banded import BOUND, NAME
from hf_rope_ext.finetune.shifted import use_shifted_attention
from hf_rope_ext.methods import (
    LeakyReRoPE,
    LogN,
    Streaming,
    Yarn,
    make_method,
    method_from_record,
    method_record,
)

NAMES = (*ATTENTION_METHODS, "nope", "leaky_rerope+logn", "dca+temperature", "yarn+streaming")


def state(model):
    """Everything of a model that a patch could change, by value."""
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "attributes": {
            path: [*sorted(vars(part)), type(part).__name__] for path, part in model.named_modules()
        },
        "hooks": [
            len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()
        ],
    }


@pytest.mark.parametrize("name", NAMES)
def test_undoing_brings_the_model_back_bit_for_bit(llama, ids, name):
    before, expected = state(llama), logits(llama, ids)
    patch_model(llama, name, **knobs(name))
    assert state(llama) != before
    unpatch_model(llama)
    assert state(llama) == before
    assert torch.equal(logits(llama, ids), expected)


def test_a_block_brings_the_patch_before_it_back(llama, ids):
    patch_model(llama, "dca")
    expected = logits(llama, ids)
    with patched(llama, "yarn", factor=4, replace=True):
        assert llama.config._attn_implementation != NAME
        assert not any(hasattr(part, BOUND) for part in llama.modules())
    assert torch.equal(logits(llama, ids), expected)
    patch_model(llama, "yarn", factor=4, replace=True)
    with patched(llama, "dca", replace=True):
        assert torch.equal(logits(llama, ids), expected)
    assert torch.equal(logits(llama, ids), logits(patch_model(tiny_llama(), "yarn", factor=4), ids))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_stops_a_stock_reader_and_comes_back_with_ours(llama, ids, tmp_path, name):
    patch_model(llama, name, **knobs(name))
    expected = logits(llama, ids)
    llama.save_pretrained(tmp_path)

    assert torch.equal(logits(load_pretrained(tmp_path), ids), expected)
    if name != "nope":  # explicit frequencies say it all
        with pytest.raises(Exception, match="load_pretrained"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        for engine in ("transformers", "vllm", "sglang", "llama.cpp"):
            with pytest.raises(RopeError, match=f"{engine} has no form for {name.split('+')[-1]}"):
                export(llama, engine)


def test_copies_compute_the_same_also_in_another_process(llama, ids, tmp_path):
    patch_model(llama, "leaky_rerope+logn")
    expected = logits(llama, ids)
    copied = copy.deepcopy(llama)
    unpatch_model(llama)
    assert torch.equal(logits(copied, ids), expected)

    file = tmp_path / "model"
    file.write_bytes(pickle.dumps((copied, ids, expected)))
    code = (
        "import pickle, sys, torch; model, ids, expected = pickle.load(open(sys.argv[1], 'rb'));"
        "found = model(ids).logits; assert (found - expected).abs().max() < 1e-4"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


@pytest.mark.parametrize(
    "method",
    [
        *[make_method(name, **knobs(name)) for name in NAMES],
        Streaming(Yarn(4.0), sinks=2),
        LogN(LeakyReRoPE(Yarn(2.0), window=8, slowdown=3.0)),
    ],
    ids=repr,
)
def test_a_record_names_the_same_method(method):
    assert method_from_record(method_record(method)) == method


def test_a_description_names_the_method_and_its_knobs(llama):
    patch_model(llama, "leaky_rerope+logn", window=20)
    assert "leaky_rerope+logn window=20" in str(describe(llama))


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_an_adapter_trains_under_it_and_merges(llama, ids, first):
    expected = logits(patch_model(tiny_llama(), "dca"), ids)
    if first == "patch":
        patch_model(llama, "dca")
    model = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    if first == "adapter":
        patch_model(model, "dca")
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(own.grad is not None for own in model.parameters() if own.requires_grad)
    torch.testing.assert_close(logits(model.eval(), ids), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected)


def test_the_proof_makes_no_plan_known(llama):
    plans = []
    patch_model(llama, "leaky_rerope", on_plan=plans.append)
    assert not plans


def test_a_compiled_model_is_patched(llama, ids):
    torch._dynamo.reset()
    llama.compile(backend="eager")
    patch_model(llama, "dca")
    torch.testing.assert_close(logits(llama, ids), logits(patch_model(tiny_llama(), "dca"), ids))
    torch._dynamo.reset()


BAD = {
    "rerope": [
        ({"window": 0}, "at least 1|from 1"),
        ({"window": 65}, "at most the trained length"),
    ],
    "leaky_rerope": [
        ({"window": 50}, "less than 3/4 of the trained length, at most 47"),
        ({"slowdown": 0.5}, "slowdown must be"),
        ({"factor": 0.5}, "factor must be"),
    ],
    "self_extend": [({"group": 0.5}, "group must be an integer"), ({"window": 60}, "at most 37")],
    "dca": [
        ({"chunk": 65}, "chunk must be at most the limit of 64"),
        ({"limit": 65}, "limit must be at most the trained length of 64"),
    ],
    "string": [
        ({"shift": 70}, "at most the trained length"),
        ({"shift": 9, "window": 10}, "at most the shift"),
    ],
    "streaming": [({"sinks": -1}, "from 0"), ({"window": 61}, "at most 64 positions together")],
    "ramp": [({"slope": -0.1}, "slope must be"), ({}, "needs slope or factor")],
    "piecewise": [({"slowdown": 0.9}, "slowdown must be")],
    "power": [({"exponent": 1.5}, "exponent must be")],
    "xpos": [({"base_length": 0}, "base_length must be")],
    "temperature": [({"coefficient": -1}, "coefficient must be")],
    "llama4": [({"floor": 0}, "floor must be")],
    "rerope+dca": [({}, "both set the distances")],
    "logn+logn": [({}, "names 'logn' twice")],
    "yarn+alibi": [({"factor": 4}, "nothing rotates")],
    "nope+rerope": [({}, "nothing rotates")],
    "logn": [
        ({"factor": 4}, "no knob 'factor'"),
        ({"target": "vision", "original_max_position_embeddings": 16}, "vision"),
        ({"on_growth": "error"}, "same at every length"),
    ],
    "temperature+logn": [({"compat": "transformers"}, "compat")],
}


@pytest.mark.parametrize(
    ("name", "own", "message"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_bad_input_is_one_error_and_changes_nothing(llama, name, own, message):
    model = zoo.build("qwen2_vl") if "target" in own else llama
    before = state(model)
    with pytest.raises(RopeError, match=message):
        patch_model(model, name, **own)
    assert state(model) == before


def test_an_axis_has_no_attention_of_its_own():
    model = zoo.build("qwen2_vl")
    before = state(model)
    with pytest.raises(RopeError, match="one rule for all axes"):
        patch_model(model, {"t": "dca", "h": "yarn"}, factor=4)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("falcon", "does not use transformers' attention interface"),
        ("mistral", "rotates in no layer without a sliding window"),
        ("modernbert", "sees later tokens too"),
    ],
)
def test_a_family_that_cannot_be_served_is_left_as_it_was(family, reason):
    model = zoo.build(family)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        patch_model(model, "dca")
    assert state(model) == before


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"is_causal": False}])
def test_what_bands_have_not_is_refused_at_the_call(llama, ids, asked):
    patch_model(llama, "dca")
    with pytest.raises(RopeError, match=next(iter(asked))):
        llama(ids, **asked)


def test_shifted_attention_is_refused_beside_it(llama):
    patch_model(llama, "dca")
    before = state(llama)
    with pytest.raises(RopeError, match="both replace the attention"):
        use_shifted_attention(llama)
    assert state(llama) == before


def test_layers_with_a_sliding_window_are_left_alone():
    model = zoo.build("gemma2")
    patch_model(model, "dca")
    bound = [hasattr(layer.self_attn, BOUND) for layer in model.model.layers]
    kinds = model.config.layer_types
    assert bound == [kind == "full_attention" for kind in kinds]
