"""Our tasks and stock ones through lm-eval: one answer whichever way one asks."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from conftest import tiny_llama
from evaluating import TEXT, make_tokenizer
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from hf_rope_ext import RopeError, load_pretrained, patch_model
from hf_rope_ext.cli.app import main
from hf_rope_ext.evals.compare import evaluate
from hf_rope_ext.evals.lm_eval import command as launcher
from hf_rope_ext.evals.lm_eval.model import RopeHFLM
from hf_rope_ext.evals.lm_eval.tasks import KNOWN, TASK_DIRECTORY, RopeTask, task_manager
from hf_rope_ext.evals.registry import GROUPS, TASKS
from hf_rope_ext.evals.tasks.base import DocumentTask

TRAINED = 128


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=512, max_position_embeddings=TRAINED).save_pretrained(directory)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(directory)
    (directory / "text.txt").write_text(TEXT)
    return str(directory)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Call ``hf-rope eval`` in this process; returns exit status, stderr and the results."""

    def call(*words):
        output = tmp_path / f"output {len(list(tmp_path.iterdir()))}"
        line = ["hf-rope", "eval", *words, "--output_path", str(output)]
        monkeypatch.setattr(sys, "argv", line)
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        found = [json.loads(path.read_text()) for path in output.rglob("results*.json")]
        return status, capsys.readouterr().err, found[0] if found else None

    return call


def numbers(results):
    """Every number of every task, but for standard errors and names."""
    return {
        (task, name.removesuffix(",none")): value
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_the_three_routes_give_the_same_cells(saved, command):
    settings = {"n": 2, "max_new_tokens": 4, "samples": 2, "stride": 100, "depths": [0, 1]}
    tasks = ["rope_passkey_ll", "rope_copy", "rope_cot_chain_maj", "rope_ppl", "rope_passkey"]
    metadata = {**settings, "lengths": "2x,4x", "text": f"{saved}/text.txt"}
    specified = [
        "rope_passkey_ll:depths=[0,1]:max_new_tokens=4",
        "rope_copy",
        "rope_cot_chain_maj:n=2:max_new_tokens=4",
        "rope_ppl:stride=100",
        "rope_passkey:depths=[0,1]:max_new_tokens=4",
    ]
    model = patch_model(load_pretrained(saved), "yarn", factor=4)
    lm = RopeHFLM(saved, method="yarn", factor=4, batch_size=2)

    report = evaluate(model, lm.tokenizer, specified, ["2x", "4x"], text=TEXT, samples=2)
    called = simple_evaluate(
        lm, tasks=tasks, task_manager=task_manager(lm, **metadata), bootstrap_iters=0
    )
    status, _, written = command(
        *("--model_args", f"pretrained={saved},method=yarn,factor=4", "--batch_size", "2"),
        *("--tasks", ",".join(tasks), "--metadata", json.dumps(metadata)),
    )

    assert status == 0
    assert numbers(written) == numbers(called)
    assert written["config"]["rope"]["method"]["name"] == "yarn"
    found = numbers(called)
    for cell in report.cells:
        task, length = cell["task"].partition(":")[0], cell["length"]
        name = "perplexity" if task == "rope_ppl" else "score"
        assert found[task, f"{name}@{length}"] == pytest.approx(cell[name], rel=1e-6)
        for part in cell.get("parts", ()):
            assert found[task, f"score@{length}/{part['depth']}"] == part["score"]
    for task, name in (("rope_passkey_ll", "nll"), ("rope_cot_chain_maj", "confidence")):
        cells = [cell[name] for cell in report.cells if cell["task"].startswith(task)]
        assert found[task, name] == pytest.approx(sum(cells) / len(cells), rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(saved, command, tmp_path):
    words = ["--model_args", f"pretrained={saved},method=dynamic_yarn,factor=4"]
    words += ["--tasks", "rope_passkey_ll,rope_ppl,rope_cot_chain_maj", "--batch_size", "2"]
    settings = {"n": 3, "max_new_tokens": 6, "text": f"{saved}/text.txt", "lengths": "2x,4x"}
    words += ["--metadata", json.dumps({"samples": 1, "stride": 100, **settings})]
    _, _, alone = command(*words)
    processes = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    output = ["--output_path", str(tmp_path / "two")]

    subprocess.run(
        [sys.executable, *processes, *fixed, "-m", "hf_rope_ext", "eval", *words, *output],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        check=True,
        capture_output=True,
    )

    (path,) = (tmp_path / "two").rglob("results*.json")
    together = json.loads(path.read_text())
    assert numbers(together) == pytest.approx(numbers(alone), rel=1e-5)
    assert together["n-samples"] == alone["n-samples"]


STOCK = {
    "choice": """
task: stock_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "generate": """
task: stock_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def test_stock_tasks_run_unchanged(saved, command, tmp_path):
    rows = [
        {"question": f"the cat {number} sat on", "choices": [" a mat", " it"], "gold": number % 2}
        for number in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in STOCK.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    stock = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tasks = ["stock_choice", "stock_generate"]

    plain = simple_evaluate(
        "hf", f"pretrained={saved}", tasks=tasks, task_manager=stock, device="cpu"
    )
    status, _, ours = command(
        *("--model_args", f"pretrained={saved}", "--include_path", str(tmp_path)),
        *("--tasks", ",".join(tasks), "--batch_size", "3"),
    )

    assert status == 0
    assert numbers(ours) == numbers(plain)
    assert ours["config"]["rope"]["method"] is None


def test_lm_evals_hellaswag_runs_unchanged_on_rows_of_ones_own(
    saved, command, tmp_path, monkeypatch
):
    rows = [
        {
            "activity_label": "Cooking",
            "ctx_a": f"The cook takes {number} eggs [step].",
            "ctx_b": "he",
            "endings": ["breaks them.", "sings.", f"counts {number} eggs.", "leaves."],
            "label": str(number % 4),
        }
        for number in range(5)
    ]
    # the name of the data set in the task's file is a directory here
    data = tmp_path / "Rowan" / "hellaswag"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    own = str(Path(lm_eval.__file__).parent / "tasks" / "hellaswag")
    stock = TaskManager(include_path=own, include_defaults=False)

    plain = simple_evaluate(
        "hf", f"pretrained={saved}", tasks=["hellaswag"], task_manager=stock, device="cpu"
    )
    status, _, ours = command(
        *("--model_args", f"pretrained={saved}", "--include_path", own, "--tasks", "hellaswag")
    )

    assert status == 0
    assert numbers(ours) == numbers(plain)
    assert ours["n-samples"]["hellaswag"]["original"] == 5


def test_lm_evals_ruler_runs_unchanged_on_a_patched_model(saved, command, monkeypatch):
    generator = pytest.importorskip(
        "lm_eval.tasks.ruler.prepare_niah", reason="needs nltk and wonderwords"
    )
    own = str(Path(generator.__file__).parent)
    whole = generator.generate_samples

    def fewer(*args, **settings):  # than 500
        return whole(*args, **{**settings, "num_samples": 2})

    monkeypatch.setattr(generator, "generate_samples", fewer)

    status, _, results = command(
        *("--model_args", f"pretrained={saved},method=yarn,factor=12", "--include_path", own),
        *("--tasks", "niah_single_1", "--limit", "2"),
        *("--metadata", json.dumps({"tokenizer": saved, "max_seq_lengths": [1024]})),
    )

    assert status == 0
    assert results["results"]["niah_single_1"]["1024,none"] == 0.0
    assert results["n-samples"]["niah_single_1"]["original"] == 2
    assert results["config"]["rope"]["method"]["name"] == "yarn"


@pytest.mark.parametrize("model", ["hf_rope", "hf"])
def test_a_model_whose_length_was_not_raised_is_not_scored(saved, command, model):
    words = ["--model", model, "--model_args", f"pretrained={saved}", "--tasks", "rope_passkey"]

    status, err, results = command(*words, "--metadata", '{"lengths": [128, 256]}')

    assert status == 2
    assert "a length of 256 was requested, but the model's is 128" in err.splitlines()[-1]
    assert results is None


@pytest.mark.parametrize("task", ["rope_passkey", "rope_passkey_ll", "rope_short"])
def test_a_model_in_memory_whose_length_was_not_raised_is_not_scored(saved, task):
    lm = RopeHFLM(saved, max_length=100)
    tasks = task_manager(lm, lengths=200, samples=1, text=f"{saved}/text.txt")

    with pytest.raises(RopeError, match=r"the model's (length )?is 100"):
        simple_evaluate(lm, tasks=[task], task_manager=tasks)


def test_every_task_has_its_file():
    index = TaskManager(include_path=str(TASK_DIRECTORY), include_defaults=False)

    assert set(index.all_subtasks) == set(KNOWN)
    assert set(TASKS) - set(KNOWN) == {"perplexity", "passkey", "rope_vniah", "rope_vniah_d"}
    assert set(index.all_groups) >= {"rope_ruler", "rope_babi", "rope_retrieval", "rope_cot"}
    for task in KNOWN:
        text = (TASK_DIRECTORY / f"{task}.yaml").read_text()
        forced = isinstance(TASKS[task], DocumentTask) and TASKS[task].kind == "loglikelihood"
        assert f"dataset_name: {task}\n" in text
        assert ("output_type: loglikelihood" in text) == forced
    for group in index.all_groups:
        members = index.task_index[group].cfg["task"]
        assert set(members) <= set(index.all_tasks)
        assert members == GROUPS.get(group, members)


def make_task(saved, name="rope_passkey", **metadata):
    common = {"pretrained": saved, "method": "yarn", "lengths": "2x", "samples": 1}
    manager = TaskManager(
        include_path=str(TASK_DIRECTORY),
        include_defaults=False,
        metadata={**common, **metadata},
    )
    return manager.load([name])["tasks"][name]


def test_a_document_is_asked_word_for_word(saved):
    task = make_task(saved)
    task.build_all_requests(rank=0, world_size=1)

    assert isinstance(task, RopeTask)
    assert [one.args[0] for one in task.instances] == [
        doc["prompt"] + doc["answer"] for doc in task.eval_docs
    ]
    assert {one.args[1]["max_gen_toks"] for one in task.instances} == {10}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope_pasky": {"depths": [0.5]}}, "Did you mean 'rope_passkey'"),
        ({"depth": [0.5]}, "Did you mean 'depths'"),
        ({"sample": 3}, "Did you mean 'samples'"),
        ({"lengths": "long"}, "neither a number of tokens"),
        ({"lengths": 20}, "too short"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
        ({"pretrained": None}, "trained length is not known"),
        ({"pretrained": None, "lengths": 128}, "tasks need the model's tokenizer"),
        ({"name": "rope_ppl"}, "needs a long text"),
        ({"name": "rope_ppl", "text": "nowhere.txt"}, "cannot read the text"),
    ],
)
def test_a_wrong_setting_is_named(saved, metadata, message):
    with pytest.raises(RopeError, match=message):
        make_task(saved, **metadata)


def test_settings_under_the_name_of_a_task_are_for_it_alone(saved):
    settings = {"depths": [0, 1], "rope_needle": {"depths": [0.5]}, "lengths": "4x"}

    assert len(make_task(saved, "rope_passkey", **settings).eval_docs) == 2
    (document,) = make_task(saved, "rope_needle", **settings).eval_docs
    assert document["depth"] == 0.5


def test_a_yaml_file_of_ones_own_makes_a_variant(saved, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"include: {TASK_DIRECTORY / '_rope_yaml'}\ntask: mine\ndataset_name: rope_passkey\n"
        f"metadata: {{version: 1.0, depths: [0.25], samples: 3, lengths: 256, method: yarn}}\n"
    )
    manager = TaskManager(
        include_path=str(tmp_path), include_defaults=False, metadata={"pretrained": saved}
    )

    documents = manager.load(["mine"])["tasks"]["mine"].eval_docs

    assert [(one["depth"], one["index"]) for one in documents] == [(0.25, 0), (0.25, 1), (0.25, 2)]


def test_more_processes_than_documents_raise(saved):
    task = make_task(saved, depths=[0.5])

    with pytest.raises(RopeError, match="1 documents for 2 processes"):
        task.build_all_requests(rank=1, world_size=2)


def test_prompts_of_an_earlier_run_are_not_reused(saved, command):
    words = ("--model_args", f"pretrained={saved}", "--tasks", "rope_passkey")
    status, err, _ = command(*words, "--cache_requests", "true")

    assert status == 2
    assert "omit it" in err


def test_answers_are_kept_for_each_model_apart(saved, command, tmp_path):
    def score(method):
        words = ["--model_args", f"pretrained={saved},method={method},factor=4"]
        words += ["--tasks", "rope_passkey_ll", "--use_cache", str(tmp_path / "cache")]
        _, _, results = command(*words, "--metadata", '{"lengths": "2x", "samples": 1}')
        return results["results"]["rope_passkey_ll"]["nll,none"]

    yarn, linear = score("yarn"), score("linear")

    assert yarn != linear
    assert len(list(tmp_path.glob("cache*"))) == 2


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)

    with pytest.raises(RopeError, match=r"pip install 'hf-rope-ext\[eval\]'"):
        launcher.launch(["--tasks", "rope_passkey"])
