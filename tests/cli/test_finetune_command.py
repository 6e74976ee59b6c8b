"""The commands, the example and its recipes, quantized weights, and the memory estimate."""

import importlib.machinery
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import logits, tiny_llama
from finetuning import recipe, training, write_model, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_rope_ext import RopeError, load_pretrained, patch_model
from hf_rope_ext.__main__ import main
from hf_rope_ext.finetune import add_adapter, estimate_memory, finetune, parse
from hf_rope_ext.finetune.recipe import describe_flags
from hf_rope_ext.rotary.installed import patch_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("hf_rope_ext.finetune.run.plot_curve", lambda history, path: None)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    return write_text(tmp_path / "data.jsonl")


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["hf-rope", *map(str, words)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_a_recipe_is_run_and_its_adapter_merged(tmp_path, model, data, ids, monkeypatch, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": str(model),
                "data": str(data),
                "factor": 2,
                "max_steps": 9,
                "eval_lengths": "1x",
                "eval_passkeys": 0,
                "eval_targets": 8,
                "held_out": 0.1,
                "use_cpu": True,
                "disable_tqdm": True,
                "eval_strategy": "no",
                "cache": str(tmp_path / "cache"),
            }
        )
    )
    words = [file, "--max_steps", 2, "--output_dir", tmp_path / "out", "--json"]

    assert command(monkeypatch, "finetune", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"].keys() == found["after"].keys() == {"perplexity_64"}
    tuned = load_pretrained(tmp_path / "out").eval()
    assert command(monkeypatch, "merge", tmp_path / "out", tmp_path / "merged") == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock, ids), logits(tuned, ids), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_one_line(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "finetune", "--modle", "m") == 2
    assert "Did you mean 'model'" in capsys.readouterr().err
    assert command(monkeypatch, "finetune", tmp_path / "none.yaml") == 2
    assert "cannot read the recipe" in capsys.readouterr().err
    assert command(monkeypatch, "merge", tmp_path, tmp_path / "out") == 2
    assert "holds no adapter" in capsys.readouterr().err


def test_every_field_is_listed_with_what_it_says(monkeypatch, capsys):
    rows = describe_flags()

    assert len(rows) > 30
    assert all(says and ": " not in says[:15] for _, _, says in rows)
    assert command(monkeypatch, "finetune", "--fields") == 0
    assert "pose_length" in capsys.readouterr().out


def test_the_example_runs(tmp_path, data, monkeypatch, capsys):
    model = write_model(tmp_path / "base", max_position_embeddings=128)
    words = ["--model", model, "--data", data, "--factor", 2, "--steps", 1, "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *map(str, words)])

    runpy.run_path(str(EXAMPLES / "finetune_lora.py"), run_name="__main__")

    assert "yarn" in capsys.readouterr().out
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("name", ["yarn_lora", "qlora", "pose"])
def test_the_recipes_of_the_examples_are_understood(name, tmp_path):
    found, _ = parse(["--output_dir", str(tmp_path)], EXAMPLES / "finetune" / f"{name}.yaml")

    assert found.method == "yarn"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "context_parallel", "sequence_parallel"])
def test_the_launch_configs_have_no_field_accelerate_does_not_know(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = EXAMPLES / "finetune" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    flags = {action.dest for action in launch_command_parser()._actions}

    assert config.num_processes == 8
    for group in ("fsdp_config", "parallelism_config"):
        assert set(getattr(config, group)) <= flags


@pytest.mark.parametrize("technique", ["pose_length", "shifted_groups", "mixed_windows"])
def test_techniques_that_need_whole_sequences_are_refused_where_they_are_spread(
    technique, tmp_path, model, data, monkeypatch
):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    value = {"pose_length": 32, "shifted_groups": 4, "mixed_windows": 0.5}[technique]
    with pytest.raises(RopeError, match=f"{technique} needs whole sequences"):
        finetune(recipe(model, data, **{technique: value}), training(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_weights_are_tuned_and_come_back_with_their_rope(tmp_path, model, data):
    pytest.importorskip("bitsandbytes", reason="quantization is optional")
    done = finetune(recipe(model, data, quantize="4bit"), training(tmp_path / "out"))

    inner = done.model.get_base_model()
    layer = inner.model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    assert done.after["perplexity_64"] < done.before["perplexity_64"]
    assert patch_of(load_pretrained(tmp_path / "out")).method.factor == 2


def test_lengths_without_room_are_refused_before_anything_is_written(tmp_path, model, data):
    for change in ({"eval_targets": 64}, {"eval_passkeys": 5, "eval_lengths": "0.25x"}):
        with pytest.raises(RopeError, match=r"no context before|too short for the pass key"):
            finetune(recipe(model, data, **change), training(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_liger_is_named_where_it_is_missing(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RopeError, match="liger-kernel"):
        finetune(recipe(model, data, loss="liger"), training(tmp_path / "out"))


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel, which needs triton: it knows llama and replaces its forward."""
    asked = {}

    def llama(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ):
        raise AssertionError

    def apply(model, **kernels):
        asked.update(kernels)
        plain = model.forward
        model.forward = lambda *args, **kwargs: plain(*args, **kwargs)

    spec = importlib.machinery.ModuleSpec("liger_kernel", None)
    package, part, patches = (types.ModuleType(name) for name in ("liger_kernel", "a", "b"))
    package.__spec__, part._apply_liger_kernel_to_instance = spec, apply
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": llama, "paligemma": lambda model=None: None}
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", part)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    return asked


def test_liger_is_asked_for_its_loss_and_no_other_kernel(tmp_path, model, data, liger, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    finetune(
        recipe(model, data, loss="liger"),
        training(tmp_path / "out", max_steps=1, save_strategy="no", eval_strategy="no"),
    )

    assert {name for name, used in liger.items() if used} == {"fused_linear_cross_entropy"}
    assert liger["rope"] is False


def test_liger_is_refused_where_it_would_do_nothing(tmp_path, model, data, liger, monkeypatch):
    with pytest.raises(RopeError, match="needs a GPU"):
        finetune(recipe(model, data, loss="liger"), training(tmp_path / "out"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    other = write_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config |= {"model_type": "helium", "architectures": ["HeliumForCausalLM"], "head_dim": 16}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RopeError, match="no fused loss for 'helium'"):
        finetune(recipe(other, data, loss="liger"), training(tmp_path / "out"))


@pytest.mark.slow
def test_ligers_own_loss_trains_as_the_chunked_one(tmp_path, model, data):
    """On CPUs in triton's interpreter, which has to be chosen before triton is imported."""
    pytest.importorskip("liger_kernel", reason="needs triton, which CPUs lack")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from finetuning import recipe, training\n"
        "from hf_rope_ext.finetune import finetune\n"
        "model, data, out = map(Path, sys.argv[2:])\n"
        "how = {'max_steps': 2, 'save_strategy': 'no', 'eval_strategy': 'no'}\n"
        "for loss in ('chunked', 'liger'):\n"
        "    finetune(recipe(model, data, loss=loss), training(out / loss, **how))\n"
    )
    words = [str(Path(__file__).parents[1]), str(model), str(data), str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script, *words], env=environment, check=True)
    liger, chunked = (
        load_file(tmp_path / loss / "adapter_model.safetensors") for loss in ("liger", "chunked")
    )

    assert liger.keys() == chunked.keys()
    for name, weight in chunked.items():
        torch.testing.assert_close(liger[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_the_estimate_counts_weights_and_moments_exactly_and_follows_the_settings():
    model = add_adapter(patch_model(tiny_llama(num_hidden_layers=6), "yarn", factor=4))
    weights = sum(one.numel() for one in model.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    found = estimate_memory(model, 1000)

    assert found.weights == 4 * weights
    assert found.training == (4 + 8) * trained
    assert found.total == found.weights + found.training + found.activations + found.loss
    assert estimate_memory(model, 1000, checkpointing=False).activations > found.activations
    assert estimate_memory(model, 1000, offload=True).activations < found.activations
    assert estimate_memory(model, 1000, loss_chunk=None).loss == 1000 / 512 * found.loss
    assert estimate_memory(model, 1000, shards=2).weights == found.weights // 2


def test_the_estimate_is_of_the_device_that_trains_not_of_the_one_that_loaded(monkeypatch):
    model = add_adapter(patch_model(tiny_llama(), "yarn", factor=4))
    free = {"cpu": 10**6, "cuda": 10**5}
    monkeypatch.setattr("hf_rope_ext.finetune.memory._free", lambda device: free[device.type])

    here = estimate_memory(model, 1000)
    there = estimate_memory(model, 1000, device=torch.device("cuda", 0))

    assert here.available == 10**6 + here.weights
    assert (there.available, there.device, there.total) == (10**5, "cuda:0", here.total)


def test_the_docs_numbers_are_those_of_the_committed_results():
    root = EXAMPLES.parent
    docs = (root / "docs" / "finetuning.md").read_text(encoding="utf-8")
    rows = [line.split("|")[3:-1] for line in docs.splitlines() if " ± " in line]
    found = json.loads((root / "benchmarks" / "results" / "finetune_bundled.json").read_text())
    assert found["settings"]["seeds"] == 3
    expected = [
        (own["before"][name]["mean"], own["after"][name]["mean"], own["after"][name]["stdev"])
        for own in found["results"].values()
        for task in ("perplexity", "passkey")
        for name in (f"{task}_{length}" for length in (512, 1024, 2048, 4096))
    ]

    cells = [cell for row in rows for cell in row]
    assert len(cells) == len(expected) == 32
    for cell, numbers in zip(cells, expected, strict=True):
        share = 100 if "%" in cell else 1
        rounding = 0.501 if share == 100 else max(0.00501, 0.0025 * numbers[0])
        shown = [float(word.strip(" %")) for word in cell.replace("±", "→").split("→")]
        assert shown == pytest.approx([share * number for number in numbers], abs=rounding)


def test_the_docs_table_of_losses_is_that_of_the_committed_results():
    root = EXAMPLES.parent
    docs = (root / "docs" / "finetuning.md").read_text(encoding="utf-8")
    results = json.loads((root / "benchmarks" / "results" / "finetune_loss.json").read_text())
    results = results["results"]
    alone = results["loss alone"]
    rows = [
        (f"{kind}, {size}", values, form)
        for kind, name, form in (
            ("peak MiB", "peak bytes", lambda number: f"{number / 2**20:,.0f}"),
            ("seconds", "seconds", lambda number: f"{number:.1f}"),
            (
                "relative error of the loss",
                "relative errors",
                lambda errors: f"{errors['loss']:.0e}",
            ),
            (
                "relative error of the weight's gradient",
                "relative errors",
                lambda errors: f"{errors['gradient of weight']:.1e}",
            ),
        )
        for size, values in alone[name].items()
    ]

    assert len(rows) == 14
    for title, values, form in rows:
        sides = ("all logits", "calls", "torch", "torch in float32")
        cells = [form(values[side]) if side in values else "" for side in sides]
        assert f"| {' | '.join([title, *cells])} |".replace("|  |", "| |") in docs
    assert f"peaks at {results['chunked memory over plain']:.2f} of the memory" in docs
    speed = results["chunked speed over plain"]["median"]
    assert f"takes {1 / speed:.2f} of the time" in docs
