"""What is trained, and that it comes back under the RoPE it was trained with."""

import json

import pytest
import torch
import zoo
from conftest import logits, tiny_llama
from finetuning import byte_tokenizer, write_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_rope_ext import (
    ExportError,
    RopeError,
    load_pretrained,
    patch_model,
    save_pretrained,
    unpatch_model,
)
from hf_rope_ext.finetune import (
    add_adapter,
    find_norms_and_embeddings,
    find_target_modules,
    load_adapter,
    merge_adapter,
)
from hf_rope_ext.patching.adapter_record import ADAPTER_RECORD


@pytest.fixture
def base(tmp_path):
    return write_model(tmp_path / "base")


def trained(model, ids):
    """Take a few large steps."""
    torch.manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-2)
    model.train()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def tuned(base, ids, method="yarn", **settings):
    model = patch_model(AutoModelForCausalLM.from_pretrained(base), method, factor=4)
    return trained(add_adapter(model, **settings), ids)


LLAMA_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA_MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("stack", "last"),
    [
        ("llama", LLAMA_ATTENTION),
        ("qwen3", LLAMA_ATTENTION),
        ("phi3", {"qkv_proj", "o_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("falcon", {"query_key_value", "dense"}),
        (
            "deepseek_v3",
            {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        ),
        ("qwen2_vl", LLAMA_ATTENTION),
        ("gemma3", LLAMA_ATTENTION),
        ("mllama", LLAMA_ATTENTION),  # its layers are named after their attention
        (
            "longcat_flash",  # with two attentions in a layer, which are not named so
            {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        ),
    ],
)
def test_targets_are_the_attention_projections_of_the_text_model(stack, last):
    model = zoo.build(stack)
    paths = find_target_modules(model)

    assert {path.rsplit(".", 1)[-1] for path in paths} == last
    assert not any("visual" in path or "vision" in path for path in paths)
    layers = zoo.text_config(model.config).num_hidden_layers
    assert len(paths) == layers * len(last)
    wrapped = add_adapter(model)
    adapted = {name for name, _ in wrapped.named_modules() if name.endswith(".lora_A")}
    assert adapted == {f"base_model.model.{path}.lora_A" for path in paths}


def test_an_mlp_beside_the_attention_of_a_part_named_after_it_is_no_target():
    paths = find_target_modules(zoo.build("zamba2"))

    assert {path.rsplit(".", 1)[-1] for path in paths} == LLAMA_ATTENTION


def test_every_linear_layer_of_the_blocks_can_be_a_target(llama):
    llama.model.layers[0].mlp.table = torch.nn.Embedding(4, 4)  # its weight is a matrix too
    last = {path.rsplit(".", 1)[-1] for path in find_target_modules(llama, "all-linear")}

    assert last == LLAMA_ATTENTION | LLAMA_MLP
    with pytest.raises(RopeError, match="targets must be one of 'attention', 'all-linear'"):
        find_target_modules(llama, "mlp")


def test_norms_are_those_of_the_hidden_state_and_no_others():
    """By suffix, as recipes write them, `norm` would also catch q_norm and k_norm."""
    model = zoo.build("qwen3")
    paths = find_norms_and_embeddings(model)

    assert {path.rsplit(".", 1)[-1] for path in paths} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    wrapped = add_adapter(model, norms_and_embeddings=True)
    free = {
        name
        for name, weight in wrapped.named_parameters()
        if weight.requires_grad and "norm" in name
    }
    assert not any("q_norm" in name or "k_norm" in name for name in free)
    assert len(free) == 2 * model.config.num_hidden_layers + 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_embedding_stays_tied_and_comes_back(tmp_path, ids, tied):
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    model = tuned(base, ids, norms_and_embeddings=True)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()

    assert torch.equal(embedding.weight, head.weight) == tied
    save_pretrained(model, tmp_path / "adapter")
    found = load_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=0, atol=0)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("method", ["yarn", "ntk", "dynamic_yarn"])
def test_an_adapter_comes_back_with_its_rope(tmp_path, base, ids, adapter, method):
    model = tuned(base, ids, method, adapter=adapter)
    save_pretrained(model, tmp_path / "adapter")

    expected = logits(model, ids)
    for found in (
        load_pretrained(tmp_path / "adapter"),
        load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"),
        load_adapter(
            patch_model(AutoModelForCausalLM.from_pretrained(base), method, factor=4),
            tmp_path / "adapter",
        ),
    ):
        torch.testing.assert_close(logits(found.eval(), ids), expected, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="load it with hf_rope_ext"):
        forgetful = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
        )
    assert (logits(forgetful.eval(), ids) - expected).abs().max() > 0.1


def test_no_rotary_buffer_is_trained_or_saved(tmp_path, base, ids):
    model = tuned(base, ids)
    save_pretrained(model, tmp_path / "adapter")

    assert not any("rotary" in name for name, _ in model.named_parameters())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)


def test_patching_before_or_after_peft_gives_the_same(base, ids):
    def build(first):
        model = AutoModelForCausalLM.from_pretrained(base)
        if first:
            patch_model(model, "yarn", factor=4)
        torch.manual_seed(3)
        model = add_adapter(model)
        if not first:
            patch_model(model, "yarn", factor=4)
        return trained(model, ids)

    torch.testing.assert_close(logits(build(True), ids), logits(build(False), ids), rtol=0, atol=0)


def test_a_base_with_another_rope_or_other_weights_is_refused(tmp_path, base, ids):
    save_pretrained(tuned(base, ids), tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(base)

    def refuse(model, match):
        with pytest.raises(RopeError, match=match):
            load_adapter(model, tmp_path / "adapter")

    refuse(patch_model(other, "linear", factor=4), "method was .*yarn.* is .*linear")
    refuse(patch_model(other, "yarn", factor=2, replace=True), "'factor': 4.* 'factor': 2")
    unpatch_model(other)
    before = logits(other, ids)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    refuse(other, "other weights")
    refuse(tiny_llama(vocab_size=260, max_position_embeddings=128), "embeddings.: 128")
    refuse(tiny_llama({"rope_theta": 5e5}, vocab_size=260), "unscaled")
    # refused, it is as it was
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] -= 1
    assert not hasattr(other.config, "hf_rope_ext")
    torch.testing.assert_close(logits(other, ids), before, rtol=0, atol=1e-5)


def test_weights_of_another_dtype_are_not_compared(tmp_path, base, ids):
    model = tuned(base, ids)
    save_pretrained(model, tmp_path / "adapter")
    low = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    found = load_adapter(low, tmp_path / "adapter").eval()

    expected = logits(model, ids)
    assert (logits(found, ids).float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 99}', '{"version": 1}', '{"version": 1, "method": {}}']
)
def test_a_record_that_is_not_one_is_refused(tmp_path, base, ids, text):
    save_pretrained(tuned(base, ids), tmp_path / "adapter")
    (tmp_path / "adapter" / ADAPTER_RECORD).write_text(text)

    with pytest.raises(RopeError, match="record"):
        load_pretrained(tmp_path / "adapter")


def test_an_adapter_without_a_record_is_loaded_as_peft_does(tmp_path, base, ids):
    model = trained(add_adapter(AutoModelForCausalLM.from_pretrained(base)), ids)
    model.save_pretrained(tmp_path / "adapter")

    found = load_pretrained(tmp_path / "adapter").eval()

    torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "cope"])
def test_a_merged_model_is_the_same_in_stock_transformers(tmp_path, base, ids, method):
    model = patch_model(
        AutoModelForCausalLM.from_pretrained(base),
        method,
        **({} if method == "cope" else {"factor": 4}),
    )
    model = trained(add_adapter(model), ids)
    save_pretrained(model, tmp_path / "adapter")

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    stock = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    assert "peft" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert byte_tokenizer().vocab_size


def test_a_method_without_a_stock_form_is_merged_at_one_length_only(tmp_path, base, ids):
    model = tuned(base, ids, "dynamic_yarn")
    save_pretrained(model, tmp_path / "adapter")

    with pytest.raises(ExportError):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", frozen=ids.shape[1])
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-3, atol=1e-3)


def test_merging_writes_over_nothing(tmp_path, base):
    with pytest.raises(RopeError, match="holds no adapter"):
        merge_adapter(base, tmp_path / "merged")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RopeError, match="already exists"):
        merge_adapter(tmp_path, base)


def test_what_cannot_be_trained_is_refused(llama):
    with pytest.raises(RopeError, match="adapter must be one of 'lora', 'rslora', 'dora', 'full'"):
        add_adapter(llama, "qora")
    with pytest.raises(RopeError, match="lora_rank"):
        add_adapter(llama, rank=0)
    with pytest.raises(RopeError, match="PEFT cannot adapt"):
        add_adapter(llama, targets=["no_such_layer"])
    with pytest.raises(RopeError, match="LlamaModel has no head"):
        add_adapter(llama.model)
    assert not any("lora" in name for name, _ in llama.named_modules())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("norms", [False, True])
def test_an_adapter_is_the_one_asked_for(kind, norms, tied):
    def settings(**chosen):
        model = tiny_llama(tie_word_embeddings=tied)
        return add_adapter(model, norms_and_embeddings=norms, **chosen).peft_config["default"]

    found = settings(adapter=kind, rank=3, alpha=7.0, dropout=0.25)
    assert (found.r, found.lora_alpha, found.lora_dropout) == (3, 7.0, 0.25)
    assert (found.use_rslora, found.use_dora) == (kind == "rslora", kind == "dora")
    assert set(found.target_modules) == LLAMA_ATTENTION
    assert bool(found.modules_to_save) == norms
    assert bool(found.ensure_weight_tying) == (norms and tied)
    assert found.task_type == "CAUSAL_LM"
    if kind == "lora":
        assert settings(rank=1).r == 1
        default = settings()
        assert (default.r, default.lora_alpha, default.lora_dropout) == (8, 16, 0.0)
        assert (default.use_rslora, default.use_dora) == (False, False)
        assert set(settings(targets=["q_proj"]).target_modules) == {"q_proj"}
        assert set(settings(targets="all-linear").target_modules) == LLAMA_ATTENTION | LLAMA_MLP


def test_a_head_counts_as_tied_where_it_shares_the_embedding_whatever_the_config_says(ids):
    untied = tiny_llama(tie_word_embeddings=True)
    untied.lm_head.weight = torch.nn.Parameter(2 * untied.lm_head.weight.detach())
    before = logits(untied, ids)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT goes by the config
        wrapped = add_adapter(untied, norms_and_embeddings=True)
    torch.testing.assert_close(logits(wrapped, ids), before)

    silent = add_adapter(zoo.build("qwen2_audio"), norms_and_embeddings=True)  # has no such entry
    for model in (wrapped, silent):
        assert model.get_input_embeddings().weight.requires_grad
        assert not model.get_output_embeddings().weight.requires_grad


def test_short_names_are_used_only_where_they_match_nothing_else():
    model = tiny_llama()
    model.model.extra = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    config = add_adapter(model).peft_config["default"]

    assert {name.rpartition(".")[2] for name in config.target_modules} == LLAMA_ATTENTION
    assert all(name.startswith("model.layers.") for name in config.target_modules)
    assert not any("lora" in name for name, _ in model.model.extra.named_modules())


def test_a_norm_that_matches_elsewhere_is_not_trained_by_chance():
    model = tiny_llama()
    model.vision_model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)})

    with pytest.raises(RopeError, match=r"differ in .*train_norms_and_embeddings"):
        add_adapter(model, norms_and_embeddings=True)


def test_blocks_are_those_with_attention_wherever_they_stand():
    model, expected = tiny_llama(), find_target_modules(tiny_llama(), "all-linear")
    others = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    model.model._modules = {"others": others, **model.model._modules}
    assert find_target_modules(model, "all-linear") == expected

    del model.model._modules["embed_tokens"]
    assert find_target_modules(model, "all-linear") == expected


def test_a_patch_of_a_part_does_not_change_which_model_is_trained():
    model = zoo.build("qwen2_vl")
    expected = find_target_modules(model)

    assert find_target_modules(patch_model(model, "yarn", factor=4)) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_trains_the_whole_text_model_and_its_head(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    model.requires_grad_(False)

    add_adapter(model, "full")

    assert all(weight.requires_grad for weight in model.parameters())
    assert model.lm_head.weight.requires_grad


def test_full_fine_tuning_needs_no_stack_of_layers_that_can_be_told():
    model = add_adapter(zoo.build("hrm_text"), "full")  # its layers stand in two stacks, deeper

    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(RopeError, match="name the modules in lora_targets"):
        add_adapter(model)


def test_full_fine_tuning_leaves_the_vision_tower_frozen():
    model = add_adapter(zoo.build("qwen2_vl"), "full")
    free = [name for name, weight in model.named_parameters() if weight.requires_grad]

    assert free
    assert not any("visual" in name for name in free)
    assert any("lm_head" in name or "embed_tokens" in name for name in free)
