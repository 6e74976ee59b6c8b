"""The `hf-rope` command, as a user types it."""

import json
import subprocess
import sys

import pytest
import torch
import zoo
from conftest import tiny_llama
from test_evals import TEXT, make_tokenizer

from hf_rope_ext import patch_model
from hf_rope_ext.__main__ import main


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
    assert f"llama.cpp's --ctx-size must be {7 + 14 * (8 + 2) + 5 * 6 + 2}." in out
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
        (("export", "{model}", "--method", "yarn", "--factor", "4", "--to", "x"), "unknown target"),
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
