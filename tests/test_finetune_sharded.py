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
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import logits
from finetuning import recipe, training, write_model, write_text
from safetensors.torch import load_file
from test_finetune_run import HERE, assert_same, launch

from hf_rope_ext import RopeError, load_pretrained
from hf_rope_ext.adapters import ADAPTER_RECORD
from hf_rope_ext.finetune import finetune

CONFIGS = HERE.parent / "examples" / "finetune"


def environment(name):
    """What `accelerate launch` sets for its processes, with a launch config of the examples."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", "a.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
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
    assert environment("ddp")["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_USE_FSDP" not in environment("ddp")


SHARDED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
plain = AcceleratorState.__init__
def lifted(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
AcceleratorState.__init__ = lifted
from hf_rope_ext.finetune import finetune
from test_finetune_sharded import run
done = finetune(*run(*map(Path, sys.argv[2:5]), 1, int(sys.argv[5])))
weights = list(done.model.parameters())
assert all(isinstance(weight, DTensor) for weight in weights)
assert all(weight.to_local().numel() <= weight.numel() // 2 + 64 for weight in weights)
"""


def run(model, data, out, rows, steps):
    """Steps of two rows, in one process or one row in each of two; a checkpoint after each two."""
    how = {"eval_strategy": "no", "max_steps": steps}
    if rows == 1:
        how["ddp_backend"] = "gloo"
    own = recipe(model, data, resume=True, train_norms_and_embeddings=True)
    return own, training(out, per_device_train_batch_size=rows, save_steps=2, **how)


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


@pytest.mark.parametrize("method", ["dynamic_yarn", "dynamic"])
def test_a_plan_for_each_length_is_refused_where_a_sequence_is_spread(
    method, tmp_path, monkeypatch
):
    """Each process would see other positions, and take another length for the sequence's."""
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    model, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    with pytest.raises(RopeError, match="depends on the length"):
        finetune(recipe(model, data, method=method), training(tmp_path / "out"))
