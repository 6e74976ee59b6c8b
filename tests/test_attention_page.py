"""What docs/attention.md says is what was measured, and its code runs."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_rope_ext import assets
from hf_rope_ext.methods import METHODS
from hf_rope_ext.methods.attention_method import AttentionSide

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "attention_methods.json").read_text())[
    "results"
]


def table(name):
    lines = PAGE.partition(f"<!-- {name}, by")[2].partition("<!-- end of")[0].splitlines()[3:]
    return {line.split("`")[1]: line for line in lines}


def shown_row(found, method, against):
    perplexity = found["perplexity"][method]
    last = list(perplexity.values())[-1]
    cells = [f"`{method}`", " / ".join(f"{one['all']:.4g}" for one in perplexity.values())]
    ratio = last[f"over {against}"]
    cells.append("" if method == against else f"{ratio['mean']:.3f} ± {ratio['stdev']:.3f}")
    if "passkey" in found:
        shares = (
            [round(100 * one[part]) for part in ("share", "low", "high")]
            for one in found["passkey"][method].values()
        )
        cells.append(" / ".join(f"{share} ({low} to {high})" for share, low, high in shares))
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("bundled", "dynamic_yarn"),
        ("checkpoint", "dynamic_yarn"),
        ("within the trained length", "none"),
    ],
)
def test_the_tables_are_the_measured_ones(name, against):
    found = RESULTS[name]

    assert table(name) == {
        method: shown_row(found, method, against) for method in found["perplexity"]
    }


def test_perplexities_are_those_of_the_seeds():
    for found in RESULTS.values():
        for by_length in found["perplexity"].values():
            for cell in by_length.values():
                logs = torch.tensor(cell["by seed"], dtype=torch.float64).log()
                assert cell["all"] == pytest.approx(logs.mean().exp().item(), rel=1e-9)


def keys(method, length):
    return RESULTS["bundled"]["passkey"][method][str(length)]


def perplexity(method, length, on="bundled"):
    return RESULTS[on]["perplexity"][method][str(length)]["all"]


def test_within_the_trained_length_nothing_changes():
    for on in ("bundled", "checkpoint"):
        for method in RESULTS[on]["perplexity"]:
            if method.split("+")[0] in ("leaky_rerope", "self_extend", "dca", "streaming"):
                assert perplexity(method, 512, on) == pytest.approx(
                    perplexity("none", 512, on), rel=1e-5
                )


@pytest.mark.parametrize(
    ("alone", "scaled"),
    [
        ("rerope", "rerope+logn"),
        ("leaky_rerope", "leaky_rerope+logn"),
        ("self_extend", "self_extend+logn"),
        ("dca", "dca+temperature"),
    ],
)
def test_a_score_scale_finds_the_keys_that_are_lost_without(alone, scaled):
    assert keys(alone, 2048)["share"] < keys(scaled, 2048)["low"]
    assert keys(scaled, 2048)["share"] == 1


def test_streaming_recalls_its_window_alone():
    lowest = min(perplexity(method, 2048) for method in RESULTS["bundled"]["perplexity"])

    assert perplexity("streaming", 2048) == lowest
    assert [keys("streaming", length)["share"] for length in (1024, 2048)] == [0.5, 0.25]


def test_position_maps_and_what_is_untrained_do_not_work():
    for method in ("piecewise", "power", "ramp"):
        assert perplexity(method, 1024) > 1.5 * perplexity("none", 1024)
        assert keys(method, 1024)["share"] == keys(method, 2048)["share"] == 0
    for method in ("alibi", "nope"):
        assert perplexity(method, 512) > 4 * perplexity("none", 512)
        assert keys(method, 512)["share"] == 0
    assert keys("xpos", 512)["share"] == 1
    assert keys("xpos", 2048)["share"] == 0


def test_every_method_is_listed_with_its_knobs():
    section = PAGE.partition("## Methods")[2].partition("## Use")[0]
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    for name, cls in METHODS.items():
        if issubclass(cls, AttentionSide):
            for field in fields(cls):
                assert field.name in ("method", "factor") or f"`{field.name}`" in rows[name]
    assert "nope" in rows


def test_the_code_runs_as_it_stands():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    model = AutoModelForCausalLM.from_pretrained(assets.DIRECTORY)
    names = {"model": model, "inputs": {"input_ids": torch.arange(1, 21)[None]}}
    before, scaled, later = code.partition("patch_model(model, LogN")

    exec(before.replace("max_new_tokens=500", "max_new_tokens=5"), names)
    assert model.config.max_position_embeddings == 512
    assert names["output"].shape == (1, 25)
    exec(scaled + later, names)


def test_the_methods_of_the_command_are_understood():
    from hf_rope_ext.parsing import parse_methods

    (text,) = re.findall(r"--methods (\S+)", PAGE)
    chosen = list(parse_methods(text, 4.0).values())

    assert [method.name for method in chosen] == ["yarn", "logn", "temperature"]
    assert chosen[1].method.factor is None
    assert chosen[2].factor == 4.0
