"""The `hf-rope` command, as a user types it."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import zoo
from conftest import tiny_llama
from evaluating import TEXT, make_tokenizer
from peft import LoraConfig, get_peft_model

from hf_rope_ext import patch_model
from hf_rope_ext.cli.app import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=512).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command in this process; returns exit status, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["hf-rope", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "160")
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_inspect_shows_geometry_and_scaling(run, model):
    status, out, _ = run("inspect", model, "--pairs")

    assert status == 0
    assert "rope_theta" in out
    assert "10000" in out
    assert "of 8 pairs" in out
    assert "turns in training" in out


def test_inspect_prints_json(run, model):
    status, out, _ = run("inspect", model, "--json")

    assert status == 0
    assert json.loads(out)[0]["original_max_position_embeddings"] == 64


def test_plan_shows_factor_methods_memory_and_engines(run, model):
    status, out, _ = run("plan", model, "--target", "4x")

    assert status == 0
    assert "64 -> 256 positions: factor 4" in out
    for word in ("yarn", "linear", "--rope-scaling yarn", "--hf-overrides", "GiB"):
        assert word in out
    status, out, _ = run("plan", model, "--target", "256", "--json")
    assert json.loads(out)["factor"] == 4.0


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vision_model")
    zoo.config("qwen2_5_vl").save_pretrained(directory)
    return str(directory)


def test_plan_measures_a_request_with_images_and_videos(run, vision_model):
    # 4 images of 2 x 4 tokens, 10 frames of 2 x 3 tokens of which two make a step of 4 positions
    images = ("--image", "128x64", "--images", 4, "--text", 7)
    video = ("--video", "96x64", "--frames", 10, "--fps", 2)

    status, out, _ = run("plan", vision_model, *images, *video)

    assert status == 0
    tokens, positions = 7 + 4 * (8 + 2) + (5 * 6 + 2), 7 + 4 * (4 + 2) + 1 + 4 * 4 + 1
    assert f"{tokens} tokens, {positions} positions (t up to {positions - 1}, h up to" in out
    assert "assumed: images" in out
    assert "Within the trained length: nothing needs to be changed." in out
    status, out, _ = run("plan", vision_model, *images, *video, "--json")
    assert json.loads(out)["request"]["factor"] == 1.0

    status, out, _ = run("plan", vision_model, *images, *video, "--images", 14)
    assert status == 0
    assert "64 -> 109 positions: factor 1.70312" in out
    assert "yarn" in out
    assert 'by axis: factor={"t": 1.703125, "h": 1.5, "w": 1.5}' in out
    assert "note: Qwen2.5-VL's model card advises against YaRN" in out
    assert f"llama.cpp's --ctx-size to {7 + 14 * (8 + 2) + 5 * 6 + 2}." in out
    status, out, _ = run("plan", vision_model, *images, *video, "--images", 14, "--json")
    found = json.loads(out)
    assert found["factor"] == found["request"]["factor"] == 109 / 64
    assert found["request"]["largest"] == {"t": 108, "h": 95, "w": 95}
    # the cache holds tokens: 2 layers, keys and values, 2 heads of 16 numbers of 2 bytes
    assert found["cache_bytes"] == found["request"]["tokens"] * 2 * 2 * 2 * 16 * 2
    assert "limit_only=True" in found["advice"][0]


def test_plan_takes_grids_of_patches(run, vision_model):
    _, pixels, _ = run("plan", vision_model, "--video", "96x64", "--frames", 10, "--json")
    _, patches, _ = run("plan", vision_model, "--video", "5x4x6", "--json")

    _, faster, _ = run("plan", vision_model, "--video", "5x4x6", "--fps", 4, "--json")
    _, longer, _ = run("plan", vision_model, "--video", "5x4x6", "--original", 16, "--json")

    assert json.loads(faster)["request"]["largest"]["t"] == 1 + 4 * 2
    assert json.loads(longer)["request"]["factor"] == (1 + 4 * 4 + 1) / 16
    pixels, patches = json.loads(pixels)["request"], json.loads(patches)["request"]
    assert pixels.pop("assumed")
    assert not patches.pop("assumed")
    assert pixels == patches


def test_export_prints_what_the_engine_takes(run, model):
    status, out, _ = run("export", model, "--method", "linear", "--factor", 4, "--to", "llama.cpp")
    assert (status, out.strip()) == (0, "--rope-scaling linear --rope-scale 4.0 --ctx-size 256")

    status, out, _ = run("export", model, "--method", "yarn", "--target", "4x")
    assert json.loads(out)["rope_parameters"]["rope_type"] == "yarn"

    status, out, _ = run(
        "export", model, "--method", "dynamic_yarn", "--factor", 4, "--frozen", 128, "--json"
    )
    assert json.loads(out)["config"]["rope_parameters"]["factor"] == 2.0


def test_export_knows_the_recorded_method_of_a_saved_patch(run, tmp_path, model):
    status, _, err = run("export", model)
    assert status == 2
    assert "no recorded patch" in err

    patch_model(tiny_llama(), "yarn", factor=4).save_pretrained(tmp_path)
    status, out, _ = run("export", tmp_path, "--to", "llama.cpp")
    assert (status, out.split()[:4]) == (0, ["--rope-scaling", "yarn", "--rope-scale", "4.0"])


COMPARE = ("--methods", "none,yarn", "--lengths", "1x,2x", "--samples", 2, "--windows", 2)


def test_compare_writes_a_report_and_goes_on_where_it_stopped(run, model, text, tmp_path):
    words = ("compare", model, *COMPARE, "--targets", 8, "--text", text, "--output", tmp_path / "r")

    status, out, _ = run(*words)

    assert status == 0
    assert "perplexity of the same tokens" in out
    assert "pass keys retrieved" in out
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "cells.jsonl",
        "report.json",
        "cells.csv",
        "perplexity.png",
        "passkey.png",
        "passkey_depths.png",
        "report.html",
    }
    again = run(*words, "--json")
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert json.loads(again[1])["cells"] == report["cells"]


def test_compare_measures_the_tasks_asked_for_until_its_time_is_up(run, model, text, tmp_path):
    tasks = "rope_copy,rope_needle:depths=[0,1]:max_new_tokens=4,rope_ppl:stride=200:tokens=900"
    words = ("compare", model, "--methods", "none", "--lengths", "640", "--tasks", tasks)
    words = (*words, "--samples", 1, "--text", text, "--output", tmp_path / "r")

    stopped = run(*words, "--max-minutes", "0")
    status, out, _ = run(*words)

    assert stopped[0] == 0
    assert "with 0 of 3 cells" in stopped[1]
    assert status == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [cell["task"].partition(":")[0] for cell in report["cells"]] == [
        "rope_copy",
        "rope_needle",
        "rope_ppl",
    ]
    assert report["missing"] == []
    assert "rope_needle" in out
    assert "rope_ruler_vt" in run("compare", "--tasks", "list")[1]


def test_plot_draws_curves(run, model, tmp_path):
    status, _, _ = run("plot", model, "--output", tmp_path / "curves.png")

    assert status == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = run("plot", model, "--output", tmp_path / "curves.png", "--json")
    assert set(json.loads(out)["methods"]) == {"none", "linear", "ntk", "yarn"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "no/such/model"), "cannot read a model's config"),
        (("plan", "{model}", "--target", "32"), "within the trained length 64"),
        (
            ("plan", "{model}", "--target", "4x", "--text", "9"),
            "give either --target, or a request",
        ),
        (("plan", "{model}", "--image", "64x64"), "has no M-RoPE"),
        (("plan", "{model}", "--image", "64"), "neither WIDTHxHEIGHT in pixels"),
        (("plan", "{model}", "--target", "soon"), "neither a number of tokens"),
        (("plan", "{model}", "--target", "4x", "--methods", "yarm"), "Did you mean 'yarn'"),
        (("export", "{model}", "--method", "yarn", "--factor", "0.5"), "at least 1, got 0.5"),
        (("export", "{model}", "--method", "yarn"), "yarn needs factor"),
        (("export", "{model}", "--method", "yarn", "--factor", "4", "--to", "x"), "must be one of"),
        (("compare", "{model}"), "need a long text: --text FILE"),
        (("compare", "--tasks", "rope_vniah"), "has no processor"),
        (("compare", "{model}", "--text", "nowhere.txt"), "cannot read the text"),
        (("compare", "{model}", "--text", "{text}", "--lengths", "900x"), "tokens, but a length"),
        (("compare", "{model}", "--text", "{text}", "--dtype", "int8"), "dtype must be"),
        (("compare", "{model}", "--text", "{text}", "--methods", "yarn:beta"), "not knob=value"),
        (("compare", "{model}", "--text", "{text}", "--tasks", "rope_paskey"), "Did you mean"),
        (("compare", "{model}", "--text", "{text}", "--tasks", "rope_ppl:strid=2"), "'strid'"),
        (("compare", "{model}", "--text", "{text}", "--tasks", "rope_kv:depths"), "not option="),
        (
            ("compare", "{model}", "--text", "{text}", "--tasks", "rope_kv", "--lengths", "1x"),
            "too short for the task",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_status_2(run, model, text, tmp_path, words, message):
    filled = [word.format(model=model, text=text) for word in words]
    if words[0] == "compare":
        filled += ["--output", str(tmp_path / "report")]

    status, _, err = run(*filled)

    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("hf-rope: error: ")
    assert not (tmp_path / "report").exists()


def _rewrite(directory, **settings):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


BROKEN = {
    "corrupt weights": lambda path: (path / "model.safetensors").write_bytes(b"no tensors" * 9),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "own code": lambda path: _rewrite(
        path, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}
    ),
    "unknown model type": lambda path: _rewrite(path, model_type="mine"),
    "length in words": lambda path: _rewrite(path, max_position_embeddings="abc"),
    "unknown rope type": lambda path: _rewrite(
        path, rope_parameters={"rope_type": "banana", "rope_theta": 1e4}
    ),
    "config of another kind": lambda path: (path / "config.json").write_text("[1]"),
}
READERS = {
    "inspect": (),
    "plan": ("--target", "4x"),
    "export": ("--method", "yarn", "--factor", "4"),
    "plot": ("--output", "{tmp}/curves.png"),
    "compare": ("--methods", "none", "--lengths", "128", "--text", "{text}", "--output", "{tmp}/r"),
}
ABOUT_WEIGHTS = ("corrupt weights", "no weights", "no tokenizer")


@pytest.mark.filterwarnings("ignore")  # transformers deprecates some of this
@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("command", READERS)
def test_whatever_is_wrong_with_a_model_is_one_line_and_exit_status_2(
    run, model, text, tmp_path, monkeypatch, command, fault
):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    BROKEN[fault](broken)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the command asked a question"))
    words = [word.format(tmp=tmp_path, text=text) for word in READERS[command]]

    status, _, err = run(command, broken, *words)

    if fault in ABOUT_WEIGHTS and command != "compare":
        assert status == 0
        return
    assert status == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("hf-rope: error: ")
    assert len(line) > len("hf-rope: error: KeyError: ''")


def test_a_traceback_is_shown_on_request_alone(run, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "broken")
    BROKEN["unknown rope type"](tmp_path / "broken")
    monkeypatch.setenv("HF_ROPE_DEBUG", "1")

    with pytest.raises(Exception, match="banana"):
        run("inspect", tmp_path / "broken")


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta2"])
def test_a_device_that_is_not_there_is_told_before_the_model_is_loaded(
    run, model, text, monkeypatch, device
):
    monkeypatch.setattr(
        "hf_rope_ext.saving.loading.load_unpatched", lambda *_, **__: pytest.fail("it was loaded")
    )

    status, _, err = run("compare", model, "--text", text, "--device", device)

    assert status == 2
    assert f"--device {device!r} cannot be used here" in err


@pytest.mark.parametrize("command", READERS)
def test_an_empty_model_is_not_taken_for_the_bundled_one(run, text, tmp_path, command):
    words = [word.format(tmp=tmp_path, text=text) for word in READERS[command]]

    status, out, err = run(command, "", *words)

    assert (status, out) == (2, "")
    assert "MODEL is empty" in err


@pytest.mark.parametrize("flag", ["--model", "--data"])
def test_an_empty_field_of_a_recipe_is_not_taken_for_the_bundled_one(run, tmp_path, flag):
    for words in ((flag, ""), (f"{flag}=",)):
        status, _, err = run("finetune", *words, "--output_dir", tmp_path / "run")

        assert status == 2
        assert f"{flag} is empty" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "extra", "lacks"),
    [
        (("finetune", "--model", "{model}"), "finetune", "accelerate"),
        (("merge", "{model}", "{tmp}/merged"), "finetune", "peft"),
        (("plot", "{model}", "--output", "{tmp}/curves.png"), "plot", "matplotlib"),
    ],
)
def test_a_missing_package_is_told_by_our_extra(
    run, model, tmp_path, monkeypatch, command, extra, lacks
):
    """Some packages are missed by transformers, on a page that ends in an extra of its own."""

    def absent(name):
        if name == lacks:
            raise PackageNotFoundError(name)
        return version(name)

    def fail(*_, **__):
        raise ImportError(f"This needs `{lacks}`.\n\nPlease run `pip install transformers[torch]`")

    monkeypatch.setattr("hf_rope_ext.cli.options.version", absent)
    monkeypatch.setattr("hf_rope_ext.finetune.recipe.parse", fail)
    monkeypatch.setattr("hf_rope_ext.finetune.merge.merge_adapter", fail)
    monkeypatch.setattr("hf_rope_ext.evals.plots.plot_curves", fail)

    status, _, err = run(*(word.format(model=model, tmp=tmp_path) for word in command))

    assert status == 2
    assert err.startswith(f"hf-rope: error: {lacks}")
    assert err.strip().endswith(f"missing: pip install 'hf-rope-ext[{extra}]'")


def test_a_plot_makes_its_directory_and_says_what_it_cannot_write(run, model, tmp_path):
    assert run("plot", model, "--output", tmp_path / "new" / "place" / "curves")[0] == 0
    assert (tmp_path / "new" / "place" / "curves").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "curves.png", tmp_path / "curves.docx"):
        status, out, err = run("plot", model, "--output", path)
        assert (status, out) == (2, "")
        assert f"cannot write {str(path)!r}" in err


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
@pytest.mark.parametrize("method", ["linear", "ntk", "dynamic_yarn", "ntk_mixed"])
def test_a_saved_patch_is_shown_and_dropped_only_when_told_to(run, text, tmp_path, method):
    patch_model(tiny_llama(vocab_size=512), method, factor=3).save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    words = ("--methods", "none", "--lengths", "128", "--samples", 1, "--windows", 1)
    words = (*words, "--tasks", "perplexity", "--text", text, "--output", tmp_path / "report")

    shown = run("inspect", tmp_path / "saved")
    data = json.loads(run("inspect", tmp_path / "saved", "--json")[1])
    refused = run("compare", tmp_path / "saved", *words)
    served = run("compare", tmp_path / "saved", *words, "--replace")

    assert f"{method}, factor 3" in shown[1]
    assert data[0]["patch"]["method"]["name"] == method
    assert data[0]["original_max_position_embeddings"] == 64
    assert refused[0] == 2
    assert f"was saved with a patch ({method}, factor 3)" in refused[2]
    assert "--replace" in refused[2]
    assert served[0] == 0


def test_a_merged_model_shows_the_patch_it_was_trained_with(run, tmp_path):
    patched = patch_model(tiny_llama(vocab_size=512), "yarn", factor=4)
    adapted = get_peft_model(patched, LoraConfig(target_modules=["q_proj"]))
    adapted.merge_and_unload().save_pretrained(tmp_path)

    assert "yarn, factor 4" in run("inspect", tmp_path)[1]


def test_an_unpatched_model_shows_no_patch(run, model):
    assert "patch" not in run("inspect", model)[1]
    assert json.loads(run("inspect", model, "--json")[1])[0]["patch"] is None


@pytest.mark.parametrize(
    ("methods", "shown"),
    [
        ("linear", "linear"),
        ("none,linear,llama3", "linear"),
        ("linear,yarn:beta_fast=16", "yarn:beta_fast=16"),
        ("none", None),
    ],
)
def test_a_plan_has_the_words_of_a_method_that_was_asked_for(run, model, methods, shown):
    found = json.loads(run("plan", model, "--target", "4x", "--methods", methods, "--json")[1])
    _, out, _ = run("plan", model, "--target", "4x", "--methods", methods)

    assert found["exported"] == shown
    assert (f"{shown} for other engines:" in out) == (shown is not None)
    for engine, line in found["exports"].items():
        words = ("export", model, "--to", engine, "--method", shown, "--factor", 4)
        status, exported, _ = run(*words)
        assert status == 0
        if line.startswith("{"):
            assert json.loads(exported) == json.loads(line)
        else:
            assert exported.strip() == line


def test_a_wrong_option_is_a_usage_error(run, model):
    status, _, err = run("plan", model)

    assert status == 2
    assert "--target" in err


def test_the_installed_command_starts(model):
    done = subprocess.run(
        [sys.executable, "-m", "hf_rope_ext", "inspect", model, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout)[0]["model_type"] == "llama"
    assert not torch.cuda.is_initialized()
