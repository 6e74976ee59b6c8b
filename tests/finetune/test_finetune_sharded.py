"""accelerate's launch configs, and runs whose weights are sharded, against one process.

accelerate takes FSDP for a matter of GPUs and ignores it on CPUs. The runs here lift that one
condition; what shards, trains and saves is accelerate's and torch's own code, over gloo.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import logits, tiny_llama
from finetuning import (
    HERE,
    assert_same,
    byte_tokenizer,
    launch,
    recipe,
    training,
    write_model,
    write_text,
)
from safetensors.torch import load_file

from hf_rope_ext import RopeError, load_pretrained
from hf_rope_ext.finetune import finetune
from hf_rope_ext.finetune.evaluation import Evaluation
from hf_rope_ext.patching.adapter_record import ADAPTER_RECORD

CONFIGS = HERE.parent / "examples" / "finetune"


def environment(name):
    """What `accelerate launch` sets for its processes, with a launch config of the examples."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", "a.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, found = prepare_deepspeed_cmd_env(arguments)
    else:
        found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def test_the_launch_configs_say_what_they_mean_to_accelerate(monkeypatch):
    for name in ("fsdp2", "context_parallel"):
        with monkeypatch.context() as patch:
            for key, value in environment(name).items():
                patch.setenv(key, value)
            plugin = FullyShardedDataParallelPlugin()
            assert plugin.fsdp_version == 2
            assert plugin.reshard_after_forward is True
            assert plugin.cpu_ram_efficient_loading is False
            assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
            if name == "context_parallel":
                found = ParallelismConfig()
                assert (found.cp_size, found.total_size) == (8, 8)
    with monkeypatch.context() as patch:
        for key, value in environment("sequence_parallel").items():
            patch.setenv(key, value)
        found = ParallelismConfig()
        assert (found.sp_size, found.sp_backend, found.total_size) == (8, "deepspeed", 8)
    assert environment("ddp")["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_USE_FSDP" not in environment("ddp")


LIFTED = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/finetune"]
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
plain = AcceleratorState.__init__
def lifted(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
AcceleratorState.__init__ = lifted
from hf_rope_ext.finetune import finetune
from test_finetune_sharded import run
"""


def test_the_evaluation_leaves_inference_mode_for_the_model():
    """Weights that are gathered in that mode cannot be trained with afterwards."""
    model, seen = tiny_llama(), set()
    model.register_forward_pre_hook(
        lambda *args: seen.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    tokens = torch.randint(0, 128, (300,))

    Evaluation.on(tokens, byte_tokenizer(), (64, 128), windows=2, targets=8, passkeys=0).measure(
        model
    )

    assert seen == {(False, False)}


SHARDED = (
    LIFTED
    + """
from torch.distributed.tensor import DTensor
done = finetune(*run(*map(Path, sys.argv[2:5]), 1, int(sys.argv[5]), ddp_backend="gloo"))
weights = list(done.model.parameters())
assert all(isinstance(weight, DTensor) for weight in weights)
assert all(weight.to_local().numel() <= weight.numel() // 2 + 64 for weight in weights)
"""
)

SPREAD = (
    LIFTED
    + """
import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention
from torch.nn import functional
local, seen = functional.scaled_dot_product_attention, set()
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, one):
        parts = [torch.empty_like(one, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(parts, one.contiguous())
        return torch.cat(parts, dim=2)
    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(2, dim=2)[dist.get_rank()]
def ring(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    assert is_causal and attn_mask is None
    seen.add(query.shape[2])
    # each process holds an early and a late part of the sequence
    size, half = dist.get_world_size(), query.shape[2] // 2
    parts = [half * part + torch.arange(half) for part in range(2 * size)]
    held = [torch.cat((parts[rank], parts[2 * size - 1 - rank])) for rank in range(size)]
    mask = torch.cat(held) <= held[dist.get_rank()][:, None]
    return local(query, Gather.apply(key), Gather.apply(value), mask, dropout_p, **kwargs)
def swap(function):
    return lambda **kwargs: setattr(functional, "scaled_dot_product_attention", function)
_attention._enable_context_parallel_dispatcher_impl = swap(ring)
_attention._disable_context_parallel_dispatcher_impl = swap(local)
finetune(*run(*map(Path, sys.argv[2:5]), 2, int(sys.argv[5]), ddp_backend="gloo"))
assert seen == {64}, seen
"""
)


def run(model, data, out, rows, steps, **settings):
    """Steps of two rows, in one process or spread over two; a checkpoint after each two."""
    how = {"eval_strategy": "no", "max_steps": steps, "save_steps": 2, **settings}
    own = recipe(model, data, resume=True, train_norms_and_embeddings=True, attention="sdpa")
    return own, training(out, per_device_train_batch_size=rows, **how)


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_sharded_weights_train_and_are_saved_as_whole_ones(tmp_path, ids, monkeypatch):
    model, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    one, two = tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr("hf_rope_ext.finetune.run.plot_curve", lambda history, path: None)
        done = finetune(*run(model, data, one, 2, 3))
    for name, value in environment("fsdp2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)

    launch(script, [HERE, model, data, two, 3])

    # the evaluation before the steps has not disturbed what is gathered for them
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for part in (Path(), Path("checkpoint-2")):
        saved, whole = (load_file(out / part / "adapter_model.safetensors") for out in (two, one))
        assert_same(saved, whole, rtol=1e-3, atol=2e-5)
    # the base weights' hash was taken before they were spread
    records = [json.loads((out / ADAPTER_RECORD).read_text()) for out in (one, two)]
    assert records[0] == records[1]
    found = load_pretrained(two).eval()
    torch.testing.assert_close(
        logits(found, ids), logits(done.model.eval(), ids), rtol=1e-3, atol=1e-3
    )
    again = tmp_path / "again"
    shutil.copytree(two, again)
    (again / "adapter_model.safetensors").unlink()
    shutil.rmtree(again / "checkpoint-3")
    launch(script, [HERE, model, data, again, 3])
    assert losses(again) == losses(two)
    resumed, straight = (load_file(out / "adapter_model.safetensors") for out in (again, two))
    assert_same(resumed, straight, rtol=0, atol=0)


@pytest.mark.slow
def test_a_sequence_spread_over_two_processes_trains_as_a_whole_one(tmp_path, monkeypatch):
    """torch's ring attention has no kernel for CPUs, so attention gathers the keys instead.

    What remains is accelerate's, Trainer's and ours: parts of sequences, their positions, their
    shifted labels, and the loss over all of them.
    """
    model, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    one, two = tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr("hf_rope_ext.finetune.run.plot_curve", lambda history, path: None)
        finetune(*run(model, data, one, 2, 3))
    for name, value in environment("context_parallel").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    script = tmp_path / "spread.py"
    script.write_text(SPREAD)

    launch(script, [HERE, model, data, two, 3])

    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    spread, whole = (load_file(out / "adapter_model.safetensors") for out in (two, one))
    assert_same(spread, whole, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["dynamic_yarn", "dynamic"])
def test_a_plan_for_each_length_is_refused_where_a_sequence_is_spread(
    method, tmp_path, monkeypatch
):
    """Each process would see other positions, and take another length for the sequence's."""
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    model, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    with pytest.raises(RopeError, match="depends on the length"):
        finetune(recipe(model, data, method=method), training(tmp_path / "out"))
