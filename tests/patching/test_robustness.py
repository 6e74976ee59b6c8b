"""A patch survives what people do to models."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import TRAINED, logits, relative, tiny_llama
from method_knobs import PER_REQUEST, knobs
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_rope_ext import patch_model, unpatch_model
from hf_rope_ext.methods import METHODS, Yarn
from hf_rope_ext.rotary.extended import ExtendedRotary

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}


def rotary(model) -> ExtendedRotary:
    return next(part for part in model.modules() if isinstance(part, ExtendedRotary))


CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_frequencies_exact(llama, cast):
    patch_model(llama, "yarn", factor=4)
    before = rotary(llama).inv_freq.clone()

    CASTS[cast](llama)

    assert rotary(llama).inv_freq.dtype == torch.float32
    assert torch.equal(rotary(llama).inv_freq, before)
    unpatch_model(llama)
    assert torch.equal(llama.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [4096, 32768, 131072])
def test_angles_of_a_cast_model_match_float64_to_the_output_dtype(dtype, position):
    model = tiny_llama(head_dim=128)
    patch_model(model, "yarn", factor=4)
    model.to(dtype)

    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1, dtype=dtype), torch.tensor([[position]]))

    geometry = rotary(model).rotations[None].geometry
    plan = Yarn(4).plan(geometry)
    angles = (position * plan.inv_freq).repeat(2)
    rounding = torch.finfo(dtype).eps / 2 * plan.attention_scaling
    # float32 rounds an angle by up to 2 ** -24 of itself, twice: the frequency and the product
    bound = rounding + position * 2**-23 * plan.attention_scaling
    assert cos.dtype == dtype
    assert (cos[0, 0].double() - angles.cos() * plan.attention_scaling).abs().max() <= bound
    assert (sin[0, 0].double() - angles.sin() * plan.attention_scaling).abs().max() <= bound


def test_autocast_leaves_the_angles_exact(llama):
    patch_model(llama, "yarn", factor=4)
    x, positions = torch.zeros(1, 1, 1), torch.tensor([[200]])
    expected = llama.model.rotary_emb(x, positions)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = llama.model.rotary_emb(x, positions)[0]

    assert torch.equal(found, expected)


def test_full_bf16_evaluation_leaves_the_frequencies_exact(llama, tmp_path):
    patch_model(llama, "yarn", factor=4)
    before = rotary(llama).inv_freq.clone()
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)}]
    settings = TrainingArguments(
        output_dir=str(tmp_path), bf16_full_eval=True, report_to="none", use_cpu=True
    )

    Trainer(llama, settings, eval_dataset=rows).evaluate()

    assert torch.equal(rotary(llama).inv_freq, before)


def test_deepcopy_pickle_and_torch_save_keep_the_patch(llama, ids, tmp_path):
    patch_model(llama, "dynamic_yarn", factor=4)
    expected = logits(llama, ids)
    torch.save(llama, tmp_path / "model.pt")

    for twin in (
        copy.deepcopy(llama),
        pickle.loads(pickle.dumps(llama)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert torch.equal(logits(twin, ids), expected)
        unpatch_model(twin)
        assert torch.equal(logits(twin, ids), logits(tiny_llama(), ids))


def test_the_state_dict_is_that_of_the_unpatched_model(llama):
    before = list(llama.state_dict())

    patch_model(llama, "yarn", factor=4)

    assert list(llama.state_dict()) == before
    llama.load_state_dict(tiny_llama().state_dict())


def test_an_empty_copy_computes_its_frequencies_afresh(llama, ids):
    patch_model(llama, "yarn", factor=4)
    expected, weights = logits(llama, ids), llama.state_dict()

    llama.to_empty(device="cpu")
    llama.load_state_dict(weights)

    assert torch.equal(logits(llama, ids), expected)


def test_a_trip_over_the_meta_device_is_survived(llama, ids):
    patch_model(llama, "yarn", factor=4)
    expected = logits(llama, ids)
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}

    llama.to("meta")
    assert rotary(llama).inv_freq.is_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        logits(llama, ids).sum().item()
    llama.to_empty(device="cpu")
    llama.load_state_dict(weights)

    assert torch.equal(logits(llama, ids), expected)


def test_reinitialising_weights_and_resizing_embeddings_leave_the_patch(llama, ids):
    patch_model(llama, "yarn", factor=4)
    before = rotary(llama).inv_freq.clone()

    llama.resize_token_embeddings(130)
    llama.init_weights()

    assert torch.equal(rotary(llama).inv_freq, before)


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [part.grad.clone() for part in model.parameters()]


def test_gradient_checkpointing_gives_the_same_gradients(llama, ids):
    patch_model(llama, "yarn", factor=4)
    expected = gradients(llama, ids)

    llama.activation_checkpointing_enable()

    for found, wanted in zip(gradients(llama, ids), expected, strict=True):
        assert torch.equal(found, wanted)


def test_training_gives_the_rotary_module_no_gradient_and_no_place_in_an_adapter(llama, ids):
    patch_model(llama, "yarn", factor=4)
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))

    model(ids, labels=ids).loss.backward()

    assert all(not buffer.requires_grad for buffer in rotary(model).buffers())
    assert not [name for name in model.state_dict() if "rotary" in name]


def lora(model):
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    return adapted.eval()


def test_patch_then_peft_equals_peft_then_patch(ids):
    first = lora(patch_model(tiny_llama(), "yarn", factor=4))
    second = patch_model(lora(tiny_llama()), "yarn", factor=4)

    assert torch.equal(logits(first, ids), logits(second, ids))


def test_a_merged_adapter_keeps_rotation_and_config(ids, tmp_path):
    model = patch_model(lora(tiny_llama()), "yarn", factor=4)
    expected = logits(model, ids)

    merged = model.merge_and_unload()

    assert relative(logits(merged, ids), expected) < 1e-4
    assert merged.config.rope_parameters["rope_type"] == "yarn"
    assert isinstance(merged.model.rotary_emb, ExtendedRotary)
    merged.save_pretrained(tmp_path)
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(stock, ids), expected) < 1e-4


@pytest.mark.sweep
@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "dynamic_yarn"])
def test_the_whole_model_compiles_without_a_break_and_recompiles_once_for_a_new_length(
    method, llama, ids
):
    torch._dynamo.reset()
    patch_model(llama, method, factor=4)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(llama, fullgraph=True, backend=count)

    for length in (200, 150):
        found = logits(compiled, ids[:, :length])
        torch.testing.assert_close(found, logits(llama, ids[:, :length]), rtol=0, atol=1e-4)
    assert graphs <= 2
    torch._dynamo.reset()


def test_patching_a_compiled_model_takes_effect(llama, ids):
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend="eager")
    before = logits(compiled, ids)

    patch_model(compiled, "yarn", factor=4)
    assert relative(logits(compiled, ids), logits(tiny_llama(YARN), ids)) < 1e-5
    unpatch_model(compiled)

    torch.testing.assert_close(logits(compiled, ids), before)
    torch._dynamo.reset()


def test_a_dispatched_model_keeps_its_hooks(llama, ids, tmp_path):
    expected = logits(tiny_llama(YARN), ids)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.rotary_emb": "cpu"}
    model = dispatch_model(llama, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    hook = model.model.rotary_emb._hf_hook
    before = logits(model, ids)

    patch_model(model, "yarn", factor=4)

    assert model.model.rotary_emb._hf_hook is hook
    assert relative(logits(model, ids), expected) < 1e-5
    unpatch_model(model)
    assert model.model.rotary_emb._hf_hook is hook
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_offloaded_model_is_patched_before_or_after(ids, offload, tmp_path):
    expected = logits(tiny_llama(YARN), ids)
    where = {"offload_dir": tmp_path} if offload is disk_offload else {}
    device = torch.device("cpu")

    first = patch_model(tiny_llama(), "yarn", factor=4)
    offload(first, execution_device=device, **where)
    second = tiny_llama()
    offload(second, execution_device=device, **where)
    patch_model(second, "yarn", factor=4)

    assert relative(logits(first, ids), expected) < 1e-5
    assert relative(logits(second, ids), expected) < 1e-5


def test_a_quantized_model_keeps_its_weights_and_gets_the_same_frequencies(llama, ids, tmp_path):
    llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
        ),
    )
    packed = model.model.layers[0].self_attn.q_proj.weight
    assert packed.dtype == torch.uint8
    before = logits(model, ids)  # the first forward lays the weights out for this processor
    weights = packed.data.numpy().tobytes()

    patch_model(model, "yarn", factor=4)
    patch_model(llama, "yarn", factor=4)

    assert model.model.layers[0].self_attn.q_proj.weight is packed
    assert packed.data.numpy().tobytes() == weights
    assert torch.equal(rotary(model).inv_freq, rotary(llama).inv_freq)
    assert not torch.equal(logits(model, ids), before)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.sweep)]
)
def test_attention_back_ends_agree(ids, attention):
    torch._dynamo.reset()
    model = patch_model(tiny_llama(attn_implementation=attention), "yarn", factor=4)
    expected = logits(tiny_llama(YARN), ids)

    assert relative(logits(model, ids), expected) < 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in PER_REQUEST])
def test_left_padded_rows_equal_their_single_runs(llama, method):
    patch_model(llama, method, **knobs(method))
    row = torch.randint(0, 128, (1, 90))
    padded = torch.cat((torch.zeros(1, 30, dtype=torch.int64), row), dim=1)
    mask = (torch.arange(120) >= 30).long()[None]

    found = logits(
        llama, padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )

    torch.testing.assert_close(found[0, 30:], logits(llama, row)[0], rtol=0, atol=1e-4)


def test_positions_come_from_the_ids_and_not_from_the_shape(llama):
    patch_model(llama, "yarn", factor=4)
    x = torch.zeros(1, 3, 1)

    far = llama.model.rotary_emb(x, torch.tensor([[100, 7, 50]]))[0]
    one = llama.model.rotary_emb(x, torch.tensor([[7]]))[0]

    assert torch.equal(far[:, 1], one[:, 0])
