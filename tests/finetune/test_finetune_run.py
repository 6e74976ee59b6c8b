"""Whole runs: what is left behind, killed and resumed, in two processes, and what is refused."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import finetuning
import pytest
import torch
import zoo
from conftest import TRAINED, logits
from finetuning import HERE, assert_same, launch, recipe, training, write_model, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from hf_rope_ext import RopeError, load_pretrained
from hf_rope_ext.finetune import RememberRope, add_adapter, finetune, merge_adapter, parse
from hf_rope_ext.finetune.output_dir import find_last_checkpoint
from hf_rope_ext.patching.patch import patch_model
from hf_rope_ext.rotary.installed import patch_of

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant.*")


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """Drawing takes longer than training these models."""
    if "curve" not in request.node.name:
        monkeypatch.setattr("hf_rope_ext.finetune.run.plot_curve", lambda history, path: None)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    return write_text(tmp_path / "data.jsonl")


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_a_run_leaves_an_adapter_a_log_a_curve_and_numbers(tmp_path, model, data, ids):
    done = finetune(recipe(model, data), training(tmp_path / "out"))
    out = tmp_path / "out"

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_perplexity_128" in line] == [0, 2, 4, 4]
    assert done.before.keys() == {"perplexity_64", "perplexity_128"}
    assert done.after["perplexity_64"] < 0.9 * done.before["perplexity_64"]
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    expected = logits(done.model.eval(), ids)
    for saved in (out, out / "checkpoint-4"):
        found = load_pretrained(saved).eval()
        assert patch_of(found).method.factor == 2
        torch.testing.assert_close(logits(found, ids), expected, rtol=0, atol=0)
    assert (out / "checkpoint-2" / "hf_rope_ext.json").is_file()
    assert "forward" not in vars(done.model.get_base_model())


def test_the_chunked_loss_trains_as_the_plain_one(tmp_path, model, data):
    runs = {}
    how = {"save_strategy": "no", "gradient_accumulation_steps": 2}
    for loss in ("chunked", "plain"):
        finetune(recipe(model, data, loss=loss), training(tmp_path / loss, **how))
        runs[loss] = weights(tmp_path / loss)

    assert_same(runs["chunked"], runs["plain"], rtol=1e-3, atol=2e-5)


def test_activation_checkpointing_changes_nothing(tmp_path, model, data):
    for name in ("without", "with"):
        arguments = training(
            tmp_path / name, save_strategy="no", activation_checkpointing=name == "with"
        )
        finetune(recipe(model, data), arguments)

    assert_same(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=0, atol=1e-6)


def test_activations_are_not_offloaded_from_where_they_are_already(tmp_path, model, data):
    how = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    with pytest.raises(RopeError, match="offload needs a GPU"):
        finetune(recipe(model, data), training(tmp_path / "out", **how))
    assert not (tmp_path / "out").exists()


def resumable(model, data, out, **settings):
    """A run with everything random in it: dropout in the adapter, and a shuffled order."""
    return (
        recipe(model, data, lora_dropout=0.1, resume=True),
        training(
            out,
            max_steps=7,
            gradient_accumulation_steps=2,
            eval_strategy="no",
            lr_scheduler_type="cosine",
            **settings,
        ),
    )


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/finetune"]
from transformers import TrainerCallback
from hf_rope_ext.finetune import finetune, run
from test_finetune_run import resumable
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGKILL)
plain = run.LongContextTrainer
def killed(*args, **kwargs):
    trainer = plain(*args, **kwargs)
    trainer.add_callback(Kill())
    return trainer
run.LongContextTrainer = killed
finetune(*resumable(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])))
"""


def test_killed_at_a_random_step_it_ends_with_the_same_weights(tmp_path, model, data):
    step = random.Random(0).randint(3, 6)
    finetune(*resumable(model, data, tmp_path / "whole"))
    words = [str(HERE), str(model), str(data), str(tmp_path / "killed"), str(step)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()

    finetune(*resumable(model, data, tmp_path / "killed"))

    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"), rtol=0, atol=0)

    def log(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path, model, data):
    finetune(recipe(model, data), training(tmp_path / "out"))
    state = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (tmp_path / "out" / "checkpoint-6").mkdir()

    assert find_last_checkpoint(tmp_path / "out").name == "checkpoint-2"
    assert find_last_checkpoint(tmp_path / "none") is None


def test_another_run_is_neither_written_over_nor_continued_with_other_settings(
    tmp_path, model, data
):
    finetune(recipe(model, data), training(tmp_path / "out", max_steps=1))

    with pytest.raises(RopeError, match="already holds a run"):
        finetune(recipe(model, data), training(tmp_path / "out", max_steps=1))
    with pytest.raises(RopeError, match=r"factor was 2\.0.*max_steps was 1"):
        finetune(
            recipe(model, data, factor=4.0, resume=True), training(tmp_path / "out", max_steps=3)
        )


SHARED = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/finetune"]
from hf_rope_ext.finetune import finetune
from test_finetune_run import shared
paths = map(Path, sys.argv[2:5])
recipe, training = shared(*paths, 1, eval(sys.argv[5]))
assert training.world_size == 2
finetune(recipe, training)
"""


def shared(model, data, out, rows, settings):
    """Three steps of two rows, in one process or one row in each of two."""
    how = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 3}
    if rows == 1:
        how["ddp_backend"] = "gloo"
    return recipe(model, data, **settings), training(out, per_device_train_batch_size=rows, **how)


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"pose_length": 64}, marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one(tmp_path, model, data, settings):
    finetune(*shared(model, data, tmp_path / "one", 2, settings))
    script = tmp_path / "shared.py"
    script.write_text(SHARED)

    launch(script, [HERE, model, data, tmp_path / "two", settings])

    def losses(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=2e-5)


def test_any_trainer_can_remember_the_rope(tmp_path, model, data):
    base = patch_model(AutoModelForCausalLM.from_pretrained(model), "yarn", factor=2)
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)}] * 4
    trainer = Trainer(
        model=add_adapter(base),
        args=training(tmp_path / "out", max_steps=2, eval_strategy="no"),
        train_dataset=rows,
        callbacks=[RememberRope()],
    )
    trainer.train()

    found = load_pretrained(tmp_path / "out" / "checkpoint-2")
    assert patch_of(found).method.name == "yarn"


def test_a_schedule_trains_one_factor_after_the_other(tmp_path, model, data, ids):
    done = finetune(
        recipe(model, data, factor=None, factor_schedule="2:2,4:3", eval_lengths="1x,4x"),
        training(tmp_path / "out", save_steps=1),
    )

    first = load_pretrained(tmp_path / "out" / "stage-1").eval()
    last = load_pretrained(tmp_path / "out").eval()
    assert patch_of(first).method.factor == 2
    assert patch_of(last).method.factor == 4
    torch.testing.assert_close(logits(last, ids), logits(done.model.eval(), ids), rtol=0, atol=0)
    logs = [tmp_path / "out" / "stage-1" / "log.jsonl", tmp_path / "out" / "log.jsonl"]
    steps = [
        len([line for line in log.read_text().splitlines() if '"loss"' in line]) for log in logs
    ]
    assert steps == [2, 3]


def test_full_fine_tuning_leaves_a_model_that_stock_loads(tmp_path, model, data, ids):
    done = finetune(recipe(model, data, adapter="full"), training(tmp_path / "out"))

    expected = logits(done.model.eval(), ids)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=1e-4, atol=1e-4)
    found = load_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(found, ids), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Qwen2.5-VL's model card")
def test_a_vision_language_model_is_tuned_on_text(tmp_path, data, ids):
    base = tmp_path / "base"
    write_model(base)  # for its tokenizer
    model = zoo.build("qwen2_5_vl")
    model.resize_token_embeddings(finetuning.VOCABULARY, mean_resizing=False)
    model.save_pretrained(base)

    how = training(tmp_path / "out", max_steps=2)
    done = finetune(recipe(base, data, method="linear"), how)

    assert done.after["perplexity_128"] < done.before["perplexity_128"]
    assert not any("visual" in name for name in weights(tmp_path / "out"))
    expected = logits(done.model.eval(), ids)
    found = load_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(found, ids), expected, rtol=0, atol=0)
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    stock = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused_before_it_starts(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr("hf_rope_ext.finetune.memory._free", lambda device: 1000)

    with pytest.raises(RopeError, match=r"Nothing was started\. Try: activation_checkpointing"):
        finetune(recipe(model, data), training(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    finetune(recipe(model, data, check_memory=False), training(tmp_path / "out", max_steps=1))


def test_running_out_of_memory_is_one_error(tmp_path, model, data, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr("hf_rope_ext.finetune.trainer.LongContextTrainer.compute_loss", fail)
    with pytest.raises(RopeError, match="ran out of memory: tried to allocate 9 GiB"):
        finetune(recipe(model, data), training(tmp_path / "out"))


def test_a_recipe_is_a_file_with_flags_over_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ndata: d\nfactor: 4\nlearning_rate: 1e-4\nlora_targets: [q_proj, v_proj]\n"
        f"output_dir: {tmp_path}\nuse_cpu: true\nactivation_checkpointing: false\n"
    )
    found, how = parse(["--factor", "8", "--chat", "--max_steps=7"], path)

    assert (found.factor, found.lora_targets, found.chat) == (8.0, ["q_proj", "v_proj"], True)
    assert (how.learning_rate, how.max_steps, how.warmup_steps) == (1e-4, 7, 20)
    assert not how.activation_checkpointing


@pytest.mark.parametrize(
    "text",
    [
        "eval_steps:\ncheck_memory: false\nlora_targets: q_proj\nseparator: --- \nrun_name: ''\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: [none]\nmax_steps: -1\n",
        '{"eval_steps": null, "check_memory": false, "lora_targets": ["q_proj"],'
        ' "separator": "---", "run_name": "", "lr_scheduler_kwargs": {"num_cycles": 2},'
        ' "report_to": ["none"], "max_steps": -1}',
    ],
)
def test_a_file_can_hold_every_kind_of_value(tmp_path, text):
    path = tmp_path / "recipe"
    path.write_text(text)
    found, how = parse(["--output_dir", str(tmp_path), "--eval_strategy", "no"], path)

    assert (found.check_memory, found.lora_targets, found.separator) == (False, ["q_proj"], "---")
    assert (how.max_steps, how.report_to, how.run_name) == (-1, [], "")
    assert (how.eval_steps, how.lr_scheduler_kwargs) == (None, {"num_cycles": 2})


def test_a_list_in_the_file_is_replaced_by_a_flag(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lora_targets: [q_proj, v_proj]\n")
    found, _ = parse(["--output_dir", str(tmp_path), "--lora-targets", "k_proj", "o_proj"], path)

    assert found.lora_targets == ["k_proj", "o_proj"]


@pytest.mark.parametrize(
    ("text", "words", "match"),
    [
        ("modle: m", [], "Did you mean 'model'"),
        ("lora_rank: many", [], "--lora_rank.*invalid int value: 'many'"),
        ("lora_rank: 2.5", [], r"--lora_rank.*invalid int value: '2\.5'"),
        ("- a", [], "must map field names to values"),
        ("a: [", [], "cannot read the recipe"),
        ("", ["--factor", "x"], "invalid float value: 'x'"),
        ("", ["--factr", "2"], "Did you mean 'factor'"),
        ("", ["--max_steps", "1", "2"], "unexpected '2'"),
        ("factor: [2, 4]", [], "unexpected '4'"),
        ("3: m", [], "3 is not a field"),
        ("held_out: 1", [], r"held_out must be .* less than 1, got 1\.0"),
        ("mixed_windows: 0", [], r"mixed_windows must be .* greater than 0.*, got 0\.0"),
        ("adapter: lroa", [], "adapter must be one of"),
        ("loss: fast", [], "loss must be one of"),
        ("factor: 0.5", [], r"factor must be .* at least 1, got 0\.5"),
        ("sequence_length: 0", [], "sequence_length must be .* at least 2, got 0"),
        ("", ["--loss_chunk", "0"], "loss_chunk must be .* at least 1, got 0"),
        ("factor: .nan", [], "factor must be a finite number at least 1, got nan"),
        ("lora_dropout: 1", [], r"lora_dropout must be .* at least 0 and less than 1, got 1\.0"),
        ("factor: 2\ntarget_length: 8", [], "not both"),
        ("factor_schedule: 4:2,2:2", [], "increasing factors"),
        ("factor_schedule: 4x2", [], "is not factor:steps"),
        ("quantize: 4bit\nadapter: full", [], "cannot be trained"),
        ("pose_length: 64\nshifted_groups: 4", [], "choose one"),
    ],
)
def test_a_recipe_that_is_not_one_is_refused(tmp_path, text, words, match):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RopeError, match=match):
        parse(["--output_dir", str(tmp_path), *words], path)


def test_a_recipe_without_a_model_or_data_is_refused(tmp_path, model, data):
    for change, match in (({"model": ""}, "no model"), ({"data": ""}, "no data")):
        with pytest.raises(RopeError, match=match):
            finetune(dataclasses.replace(recipe(model, data), **change), training(tmp_path / "o"))


def test_where_nothing_can_be_written_nothing_is_started(tmp_path, model, data):
    with pytest.raises(RopeError, match="is not writable"):
        finetune(recipe(model, data), training(data / "out"))
    with pytest.raises(RopeError, match="is not writable"):
        finetune(recipe(model, data), training(Path("/proc/self/out")))


def test_a_base_that_was_saved_patched_is_refused(tmp_path, model, data):
    patched = patch_model(AutoModelForCausalLM.from_pretrained(model), "yarn", factor=2)
    patched.save_pretrained(model)
    with pytest.raises(RopeError, match=r"saved patched with .*yarn"):
        finetune(recipe(model, data), training(tmp_path / "out"))
    assert TRAINED == 64


SHARDED = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/finetune"]
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from conftest import tiny_llama
from hf_rope_ext import patch_model
from hf_rope_ext.finetune import chunked_loss
dist.init_process_group("gloo")
ids = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
plain = patch_model(tiny_llama(), "yarn", factor=4).train()
plain(ids, labels=ids, use_cache=False).loss.backward()
model = patch_model(tiny_llama(), "yarn", factor=4).train()
with chunked_loss(model, 10):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    row = ids[dist.get_rank()][None]
    model(row, labels=row, use_cache=False).loss.backward()
for (name, own), (_, expected) in zip(model.named_parameters(), plain.named_parameters()):
    found = own.grad.full_tensor()
    torch.testing.assert_close(found, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
print("equal")
"""


@pytest.mark.slow
def test_the_chunked_loss_trains_sharded_weights(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launch(script, [HERE])


def test_a_finished_schedule_is_continued_without_a_step(tmp_path, model, data):
    def run():
        wanted = recipe(model, data, factor=None, factor_schedule="2:2,4:2", resume=True)
        return finetune(wanted, training(tmp_path / "out", save_steps=1))

    run()
    before = weights(tmp_path / "out")
    run()

    assert_same(weights(tmp_path / "out"), before, rtol=0, atol=0)
