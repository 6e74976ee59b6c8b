"""What `patch_model` promises, on one small Llama."""

import copy
import threading
import warnings

import pytest
import torch
from conftest import TRAINED, logits, relative, tiny_llama
from method_knobs import FACTOR_ONLY, PER_REQUEST
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from hf_rope_ext import (
    AlreadyScaledError,
    MethodParameterError,
    NotPatchedError,
    RequestPolicy,
    RopeError,
    RopeWarning,
    UnknownMethodError,
    UnsupportedModelError,
    describe,
    patch_model,
    patched,
    unpatch_model,
)
from hf_rope_ext.methods import Yarn

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}


def state(model):
    """What a failed call must leave alone."""
    return (
        {path: id(module) for path, module in model.named_modules()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        model.config.to_dict(),
    )


def assert_untouched(model, before):
    modules, buffers, config = state(model)
    assert modules == before[0]
    assert config == before[2]
    assert buffers.keys() == before[1].keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, before[1][name])


def test_it_returns_the_model_it_changed(llama):
    assert patch_model(llama, "yarn", factor=4) is llama
    assert unpatch_model(llama) is llama


def test_patching_again_after_undoing_equals_patching_once(llama, ids):
    patch_model(llama, "yarn", factor=4)
    once = logits(llama, ids)

    unpatch_model(llama)
    patch_model(llama, "yarn", factor=4)

    assert torch.equal(logits(llama, ids), once)


def test_two_models_in_one_process_are_independent(llama, ids):
    other = tiny_llama()
    before = logits(other, ids)

    patch_model(llama, "linear", factor=8)
    assert torch.equal(logits(other, ids), before)
    patch_model(other, "yarn", factor=4)
    unpatch_model(llama)

    assert torch.equal(logits(llama, ids), before)
    assert relative(logits(other, ids), logits(tiny_llama(YARN), ids)) < 1e-5


def test_replacing_a_patch_starts_from_the_trained_geometry(llama, ids):
    patch_model(llama, "yarn", factor=4)
    patch_model(llama, "linear", factor=2, replace=True)

    stock = tiny_llama({"rope_type": "linear", "factor": 2.0})
    assert relative(logits(llama, ids), logits(stock, ids)) < 1e-5
    unpatch_model(llama)
    assert torch.equal(logits(llama, ids), logits(tiny_llama(), ids))


def test_a_failed_replacement_leaves_the_patch_that_was_there(llama, ids):
    patch_model(llama, "yarn", factor=4)
    before, expected = state(llama), logits(llama, ids)

    with pytest.raises(MethodParameterError):
        patch_model(llama, "longrope", factor=4, long_factor=[1.0] * 3, replace=True)

    assert_untouched(llama, before)
    assert torch.equal(logits(llama, ids), expected)
    unpatch_model(llama)
    assert torch.equal(logits(llama, ids), logits(tiny_llama(), ids))


def test_a_failed_replacement_brings_back_the_softmax_scales(llama, ids):
    patch_model(llama, "yarn", factor=4, temperature="logits")
    expected = logits(llama, ids)
    scales = [layer.self_attn.scaling for layer in llama.model.layers]

    with pytest.raises(MethodParameterError):
        patch_model(llama, "longrope", factor=4, long_factor=[1.0], replace=True)

    assert [layer.self_attn.scaling for layer in llama.model.layers] == scales
    assert scales[0] > 16**-0.5
    assert torch.equal(logits(llama, ids), expected)


def test_a_patched_model_refuses_a_second_patch(llama):
    patch_model(llama, "yarn", factor=4)
    before = state(llama)

    with pytest.raises(AlreadyScaledError, match=r"Yarn\(factor=4.0.*replace=True"):
        patch_model(llama, "linear", factor=2)

    assert_untouched(llama, before)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        },
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": TRAINED,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_model_that_is_scaled_by_its_config_is_described_and_left_alone(rope):
    model = tiny_llama(rope)
    before = state(model)

    with pytest.raises(AlreadyScaledError, match=f"{rope['rope_type']}.*replace=True"):
        patch_model(model, "linear", factor=2)

    assert_untouched(model, before)


def test_replacing_a_configs_scaling_starts_from_the_unscaled_theta(ids):
    model = tiny_llama(YARN)
    native = logits(model, ids)

    patch_model(model, "linear", factor=2, replace=True)

    stock = tiny_llama({"rope_type": "linear", "factor": 2.0})
    assert relative(logits(model, ids), logits(stock, ids)) < 1e-5
    unpatch_model(model)
    assert torch.equal(logits(model, ids), native)


@pytest.mark.parametrize("place", ["rope_parameters", "config"])
@pytest.mark.parametrize("rope_type", ["yarn", "llama3", "longrope"])
def test_replacing_starts_from_the_trained_length_that_stands_beside_the_extended_one(
    rope_type, place, ids
):
    rope = {
        "yarn": {"factor": 4.0},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    }[rope_type]
    rope = {**rope, "rope_type": rope_type, "original_max_position_embeddings": TRAINED}
    model = tiny_llama(rope, max_position_embeddings=4 * TRAINED)
    if place == "config":
        model.config.original_max_position_embeddings = TRAINED
        del model.config.rope_parameters["original_max_position_embeddings"]

    patch_model(model, "yarn", factor=4, replace=True)

    assert relative(logits(model, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    assert model.config.max_position_embeddings == 4 * TRAINED


def test_replacing_asks_for_the_trained_length_where_the_config_does_not_say_it(ids):
    model = tiny_llama({"rope_type": "linear", "factor": 2.0})
    before = state(model)

    with pytest.raises(MethodParameterError, match="pass original_max_position_embeddings"):
        patch_model(model, "yarn", factor=4, replace=True)
    assert_untouched(model, before)

    patch_model(model, "yarn", factor=4, replace=True, original_max_position_embeddings=TRAINED)
    assert relative(logits(model, ids), logits(tiny_llama(YARN), ids)) < 1e-5


def test_undoing_what_was_not_done_is_an_error(llama):
    with pytest.raises(NotPatchedError, match="LlamaForCausalLM is not patched"):
        unpatch_model(llama)


def test_the_context_manager_undoes_on_the_way_out_even_after_an_error(llama, ids):
    before = logits(llama, ids)

    def fail_inside():
        with patched(llama, "yarn", factor=4) as inside:
            assert not torch.equal(logits(inside, ids), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()

    assert torch.equal(logits(llama, ids), before)


def test_a_method_object_is_taken_as_it_is(llama, ids):
    patch_model(llama, Yarn(factor=4, beta_fast=16))

    stock = tiny_llama({**YARN, "beta_fast": 16.0})
    assert relative(logits(llama, ids), logits(stock, ids)) < 1e-5


def test_the_target_length_gives_the_factor(llama, ids):
    patch_model(llama, "yarn", target_length=4 * TRAINED)

    assert relative(logits(llama, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    assert llama.config.max_position_embeddings == 4 * TRAINED


def test_an_explicit_trained_length_is_scaled_from_whatever_the_config_says(ids):
    # as Qwen3: the config's length holds room beyond the trained one
    model = tiny_llama()
    model.config.max_position_embeddings = 80

    patch_model(model, "yarn", factor=4, original_max_position_embeddings=TRAINED)

    assert relative(logits(model, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    assert model.config.max_position_embeddings == 4 * TRAINED


def test_none_with_a_target_raises_the_length_alone(llama, ids):
    before = logits(llama, ids)

    patch_model(llama, "none", target_length=1000)

    assert llama.config.max_position_embeddings == 1000
    assert torch.equal(logits(llama, ids), before)


def test_generation_goes_on_to_the_new_length(llama):
    prompt = torch.randint(3, 128, (1, 60))

    with pytest.warns(UserWarning, match="max_length"):
        stopped = llama.generate(prompt, do_sample=False, eos_token_id=None)
    patch_model(llama, "yarn", factor=4)
    with pytest.warns(UserWarning, match="max_length"):
        longer = llama.generate(prompt, do_sample=False, eos_token_id=None)

    assert stopped.shape[1] == TRAINED
    assert longer.shape[1] > TRAINED


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "yarm", "factor": 4}, UnknownMethodError, "Did you mean 'yarn'"),
        ({"method": None, "factor": 4}, UnknownMethodError, "a method is a name"),
        ({"method": "yarn", "factor": 0.5}, MethodParameterError, "at least 1, got 0.5"),
        ({"method": "yarn", "factor": "4"}, MethodParameterError, "at least 1, got '4'"),
        ({"method": "yarn", "factor": float("nan")}, MethodParameterError, "got nan"),
        ({"method": "yarn", "factor": float("inf")}, MethodParameterError, "got inf"),
        ({"method": "yarn"}, MethodParameterError, r"needs factor \(or target_length\)"),
        (
            {"method": "yarn", "factor": 4, "target_length": 300},
            MethodParameterError,
            "target_length=300 contradicts .* 256 positions",
        ),
        (
            {"method": "yarn", "target_length": 32},
            MethodParameterError,
            "target_length=32 is less than the trained length 64",
        ),
        ({"method": "yarn", "target_length": 128.5}, MethodParameterError, "got 128.5"),
        ({"method": "yarn", "target_length": "128"}, MethodParameterError, "got '128'"),
        (
            {"method": "yarn", "factor": 4, "original_max_position_embeddings": 0},
            MethodParameterError,
            "original_max_position_embeddings must be an integer",
        ),
        (
            {"method": "longrope", "factor": 4, "long_factor": [1.0] * 7},
            MethodParameterError,
            "each of the model's 8 pairs, got 7",
        ),
        ({"method": Yarn(4), "factor": 4}, MethodParameterError, "set by the method object"),
        ({"method": Yarn(4), "target_length": 100}, MethodParameterError, "contradicts"),
        ({"method": "dynamic", "target_length": 256}, MethodParameterError, "needs factor"),
        (
            {"method": "yarn", "factor": 4, "temperature": "hot"},
            MethodParameterError,
            "temperature must be one of 'rotation', 'logits', got 'hot'",
        ),
        (
            {"method": "yarn", "factor": 4, "layer_types": ["full_attention"]},
            RopeError,
            "no rotary parameters for 'full_attention'",
        ),
        ({"method": "yarn", "factor": 4, "layer_types": "all"}, RopeError, "must be a list"),
        (
            {"method": "dynamic_yarn", "factor": 4, "temperature": "logits"},
            MethodParameterError,
            "cannot follow each request",
        ),
    ],
)
def test_bad_arguments_are_named_and_nothing_changes(llama, arguments, error, message):
    before = state(llama)

    with pytest.raises(error, match=message):
        patch_model(llama, **arguments)

    assert_untouched(llama, before)


@pytest.mark.parametrize("model", [None, "meta-llama/Llama-3.1-8B", {}])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"a model is a torch\.nn\.Module"):
        patch_model(model, "yarn", factor=4)
    with pytest.raises(UnsupportedModelError, match=r"a model is a torch\.nn\.Module"):
        unpatch_model(model)


def test_a_module_without_a_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear holds no transformers model"):
        patch_model(nn.Linear(2, 2), "yarn", factor=4)


def test_a_bert_is_refused_and_its_position_modules_are_named():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertModel(config)
    before = state(model)

    with pytest.raises(UnsupportedModelError, match=r"bert.*position_embeddings \(Embedding\)"):
        patch_model(model, "yarn", factor=4)

    assert_untouched(model, before)


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = tiny_llama()

    with pytest.raises(UnsupportedModelError, match="meta device"):
        patch_model(model, "yarn", factor=4)

    assert model.config.max_position_embeddings == TRAINED


def gemma3():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=TRAINED,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
    )
    return Gemma3ForCausalLM(config).eval()


def test_layers_with_a_bounded_window_are_left_alone_unless_asked_for():
    model = gemma3()
    rotary = model.model.rotary_emb
    local, full = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()

    patch_model(model, "linear", factor=4)
    patched_rotary = model.model.rotary_emb
    assert torch.equal(patched_rotary.sliding_attention_inv_freq, local)
    torch.testing.assert_close(patched_rotary.full_attention_inv_freq, full / 4)
    assert model.config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert model.config.rope_parameters["full_attention"]["rope_type"] == "linear"

    patch_model(model, "linear", factor=4, layer_types=["sliding_attention"], replace=True)
    patched_rotary = model.model.rotary_emb
    torch.testing.assert_close(patched_rotary.sliding_attention_inv_freq, local / 4)
    assert torch.equal(patched_rotary.full_attention_inv_freq, full)


def test_an_unknown_layer_type_lists_those_there_are():
    with pytest.raises(RopeError, match="It has: full_attention, sliding_attention"):
        patch_model(gemma3(), "linear", factor=4, layer_types=["global"])


def mistral(**settings):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED,
        **settings,
    )
    return MistralForCausalLM(config).eval()


def test_an_active_sliding_window_is_warned_about():
    with pytest.warns(RopeWarning, match="sliding window of 16 positions"):
        patch_model(mistral(sliding_window=16), "yarn", factor=4)


def test_a_window_that_is_off_or_wide_enough_is_not():
    patch_model(mistral(sliding_window=None), "yarn", factor=4)
    patch_model(mistral(sliding_window=1000), "yarn", factor=4)
    model = mistral(sliding_window=16)
    model.config.use_sliding_window = False
    patch_model(model, "yarn", factor=4)
    assert describe(model).notes == ()


def test_each_row_of_a_batch_has_its_own_length(llama):
    patch_model(llama, "dynamic_yarn", factor=4)
    short, long = torch.randint(0, 128, (1, 40)), torch.randint(0, 128, (1, 200))
    alone_short, alone_long = logits(llama, short), logits(llama, long)

    padded = torch.cat((torch.zeros(1, 160, dtype=torch.int64), short), dim=1)
    batch = torch.cat((padded, long))
    mask = torch.ones_like(batch)
    mask[0, :160] = 0
    together = logits(
        llama, batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )

    torch.testing.assert_close(together[0, 160:], alone_short[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(together[1], alone_long[0], rtol=0, atol=1e-4)
    assert torch.equal(alone_short, logits(tiny_llama(), short))


@pytest.mark.parametrize("method", [name for name in PER_REQUEST if name in FACTOR_ONLY])
def test_a_short_request_is_bit_identical_before_and_after_a_long_one(llama, ids, method):
    short = ids[:, :TRAINED]
    expected = logits(llama, short)
    patch_model(llama, method, factor=4)

    first = logits(llama, short)
    long = logits(llama, ids)
    again = logits(llama, short)

    assert torch.equal(first, expected)
    assert torch.equal(again, expected)
    assert not torch.equal(long, logits(tiny_llama(), ids))


def test_packed_documents_go_by_their_largest_position(llama):
    patch_model(llama, "dynamic_linear", factor=4)
    first, second = torch.randint(0, 128, (1, 50)), torch.randint(0, 128, (1, 60))
    positions = torch.cat((torch.arange(50), torch.arange(60)))[None]

    packed = logits(llama, torch.cat((first, second), 1), position_ids=positions, use_cache=False)

    # 110 tokens, but no document is longer than the trained 64: as if unpatched
    torch.testing.assert_close(packed[0, 50:], logits(tiny_llama(), second)[0], rtol=0, atol=1e-5)


def test_two_threads_on_one_model_do_not_mix(llama, ids):
    patch_model(llama, "dynamic_yarn", factor=4)
    inputs = {"short": ids[:, :50], "long": ids}
    expected = {name: logits(llama, value) for name, value in inputs.items()}
    wrong: list[str] = []

    def run(name):
        for _ in range(20):
            if not torch.equal(logits(llama, inputs[name]), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


def test_a_submodel_and_the_model_around_it_are_the_same_patch(llama, ids):
    patch_model(llama.model, "yarn", factor=4)

    assert relative(logits(llama, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    unpatch_model(llama)
    assert torch.equal(logits(llama, ids), logits(tiny_llama(), ids))


def test_a_copy_is_patched_and_unpatched_on_its_own(llama, ids):
    patch_model(llama, "yarn", factor=4)
    twin = copy.deepcopy(llama)

    unpatch_model(llama)

    assert relative(logits(twin, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    assert twin.config.rope_parameters["rope_type"] == "yarn"
    unpatch_model(twin)
    assert torch.equal(logits(twin, ids), logits(llama, ids))
    assert twin.config.to_dict() == llama.config.to_dict()


def test_request_options_can_be_grouped(llama, ids):
    plans = []
    flat, grouped = tiny_llama(), llama
    patch_model(flat, "dynamic_yarn", factor=4, on_growth="error", buckets=2)
    patch_model(
        grouped,
        "dynamic_yarn",
        factor=4,
        requests=RequestPolicy(on_growth="error", buckets=2, on_plan=plans.append),
    )

    assert torch.equal(logits(grouped, ids), logits(flat, ids))
    assert [plan.lengths.tolist() for plan in plans] == [[256.0]]
    assert grouped.config.hf_rope_ext == flat.config.hf_rope_ext


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"requests": RequestPolicy(), "buckets": 2}, "buckets is given beside requests="),
        ({"requests": {"buckets": 2}}, "requests must be a RequestPolicy, got {'buckets': 2}"),
        ({"requests": RequestPolicy(), "method": "yarn"}, "requests is for methods that follow"),
        ({"requests": RequestPolicy(), "target": "vision"}, "requests is for target='text'"),
    ],
)
def test_request_options_are_grouped_or_flat_and_for_who_follows_requests(
    llama, arguments, message
):
    before = state(llama)

    with pytest.raises(MethodParameterError, match=message):
        patch_model(llama, **{"method": "dynamic_yarn", "factor": 4, **arguments})

    assert_untouched(llama, before)


def test_the_factor_of_transformers_dynamic_is_explained_once_for_a_patch(llama):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        patch_model(llama, "dynamic", factor=4)

    (warning,) = [one for one in shown if issubclass(one.category, RopeWarning)]
    # transformers' own formula: factor * T / L - (factor - 1)
    assert "128 positions, twice the trained length, is scaled by 5" in str(warning.message)
