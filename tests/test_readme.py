"""The README's numbers are those of the committed results."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import zoo
import zoo_images
from rich.console import Console
from transformers import AutoModelForCausalLM

from hf_rope_ext import UnsupportedModelError, assets, available_methods, describe, request_plan
from hf_rope_ext.evals.report import load_report
from hf_rope_ext.evals.writing import make_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def printed(table):
    text = io.StringIO()
    Console(file=text, width=100, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def test_the_demos_output_is_that_of_the_committed_report():
    report = load_report(RESULTS / "demo")

    for task in report.tasks:
        assert printed(make_table(report, task)) in README


def test_the_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {"model": AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)}

    first, more, dynamic = blocks[:3]
    exec(first + more, names)
    stock = AutoModelForCausalLM.from_pretrained("longer")
    names["model"] = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)
    names["inputs"] = {"input_ids": torch.arange(1, 21)[None]}
    exec(dynamic.replace("max_new_tokens=500", "max_new_tokens=5"), names)

    assert stock.config.max_position_embeddings == 131072
    assert request_plan(names["output"]).lengths.tolist() == [25]


@pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")
def test_the_code_for_images_runs_as_it_stands():
    section = README.partition("## Images and video")[2].partition("\n## ")[0]
    vlm = zoo.build("qwen2_vl")
    names = {
        "vlm": vlm,
        "processor": lambda **_: zoo_images.image_inputs(vlm),
        "prompt": "",
        "images": [],
        "queries": torch.randn(1, 2, 4, 80),
        "positions": torch.cartesian_prod(torch.arange(2), torch.arange(2)),
    }

    try:
        for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
            exec(block, names)
    except UnsupportedModelError as error:
        assert transformers.__version__ < "5.17"
        pytest.skip(str(error))

    found = describe(vlm)
    assert found.mrope_layout["name"] == "videorope"
    assert found.vision is not None
    assert 1 < names["found"].factor < 2


def test_every_method_is_in_the_table():
    for name in available_methods():
        assert f"`{name}`" in README


def test_the_overhead_is_the_measured_one():
    found = result("overhead")
    medians = [
        part["median"] for row in found["patched over unpatched"].values() for part in row.values()
    ]
    patching = found["seconds on 32 layers"]["patch"]

    assert f"{min(medians):.2f} to {max(medians):.2f}" in README
    assert f"{patching * 1000:.0f} ms" in README
    assert f"{found['import']['added to import torch']:.1%}" in README


def test_a_third_partys_checkpoint_computes_as_in_stock_transformers():
    for row in result("real_weights").values():
        assert row["largest_relative_logit_difference"] == 0.0
        assert row["patched"] == pytest.approx(row["stock"], rel=1e-6)


def share(value):
    return "an error" if isinstance(value, str) else f"{value:.0%}"


def agreement_rows():
    found = result("cached_decoding")
    rows = {**found["families"], "a trained checkpoint, 480 to 1500": found["checkpoint"]}
    for name, row in rows.items():
        ours = {value for key, value in row.items() if not key.startswith("stock")}
        assert ours == {1.0}, name
        stock = (share(row["stock dynamic"]), share(row["stock longrope"]))
        yield f"| {name} | 100% | {stock[0]} | {stock[1]} |"


def growth_rows():
    for name, row in result("cached_decoding")["growth"].items():
        yield f"| {name} | {row['kl']:.4f} | {row['perplexity']:.3f} |"


def test_cached_decoding_agrees_as_the_readme_says():
    for row in (*agreement_rows(), *growth_rows()):
        assert row in README


def test_perplexity_by_position_is_that_of_what_the_request_needs():
    found = result("cached_decoding")["perplexity by position, per 256"]

    assert found["512 dynamic_yarn"] == found["512 none"]
    for length in (1024, 2048):
        fitting = found[f"{length} yarn at the factor that fits"]
        assert found[f"{length} dynamic_yarn"] == pytest.approx(fitting, rel=1e-3)


def test_following_the_request_costs_what_the_readme_says():
    found = result("dynamic_speed")
    ratios = [row["median"] for row in found["decode, over yarn"].values()]

    assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in README
    assert f"{found['growth']['loop that grows over loop planned']:.2f} times" in README


def tuning_rows():
    found = result("finetune_stories")
    for method, before in found["untuned"].items():
        after = found["tuned"][method]
        cells = [
            f"{value:.4g} → {after[length]['mean']:.4g} ± {after[length]['stdev']:.2g}"
            for length, value in before.items()
        ]
        yield f"| `{method}` | {' | '.join(cells)} |"


def test_fine_tuning_gives_what_the_readme_says():
    for row in tuning_rows():
        assert row in README


def axis_rows():
    found = result("mrope_axes")["accuracy"]
    wanted = [("spatial", "dense"), ("max", "dense"), ("spatial", "long"), ("spatial", "large")]
    tables = [found[setting][condition] for setting, condition in wanted]
    for way, kept in {**found["spatial"]["kept"], "frame times": None}.items():
        cells = [table[way]["4"] if way in table else None for table in tables]
        cells.append(kept and kept["1"])
        shown = [
            " / ".join(f"{share['mean']:.0f}" for share in cell.values()) if cell else ""
            for cell in cells
        ]
        yield f"| {way} | {' | '.join(shown)} |"


def time_by_size(found, condition, way):
    sizes = found["spatial"][condition][way]
    return " / ".join(f"{sizes[size]['t']['mean']:.0f}" for size in ("2", "4", "8"))


def test_scaling_by_axis_gives_what_the_readme_says():
    found = result("mrope_axes")["accuracy"]
    centred, plain, none, ntk = (
        time_by_size(found, *cell)
        for cell in (
            ("dense", "visual positions, centred"),
            ("dense", "visual positions"),
            ("long", "none"),
            ("long", "ntk, grown axes"),
        )
    )
    columns = [found[name]["dense"]["none"]["8"]["w"]["mean"] for name in ("max", "max, theta 150")]
    spread = found["spatial"]["long"]["none"]["8"]["t"]

    for row in axis_rows():
        assert row in README
    assert f"{centred} with it and {plain} without" in README
    assert f"{none} with `none` and {ntk} with `ntk` on time" in README
    assert f"`none` has {spread['mean']:.0f} ± {spread['stdev']:.0f}" in README
    assert f"{columns[0]:.0f} with `rope_theta` 100 and {columns[1]:.0f} with 150" in README
    for setting in found.values():
        for share in setting["dense"]["none"]["1"].values():
            assert share["mean"] > 99
