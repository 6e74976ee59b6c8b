"""One room knows what the installed transformers calls things."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from hf_rope_ext.models import host

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(
    r"past_key_values|cache_params|_prepare_\w+_for_generation|rope_deltas|get_rope_index"
    r"|_cached_decode_position_ids|_attn_implementation|_supports_attention_backend"
    r"|AttentionInterface|AttentionMaskInterface|masking_utils|StaticLayer|DynamicCache"
    r"|_quantized_keys|_dequantize|_mask_length|max_cache_length"
)


def names_in(source):
    """Every name, attribute, keyword and string in a source but its docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field)


def private_names(path):
    found = {name for name in names_in(path.read_text()) if PRIVATE.fullmatch(name)}
    return {name for name in found if not name.startswith("set_")}


def test_no_other_module_names_what_transformers_may_rename():
    files = [*(ROOT / "hf_rope_ext").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]
    room = Path(host.__file__)

    assert {
        path: private_names(path) for path in files if path != room and private_names(path)
    } == {}
    assert {"past_key_values", "rope_deltas", "get_rope_index"} <= private_names(room)


def test_the_last_release_tested_is_the_one_that_is_pinned():
    assert f"transformers=={host.LAST_TESTED}\n" in (ROOT / "constraints.txt").read_text()


def test_a_cache_that_keeps_zeros_when_it_is_reset_is_emptied():
    """As those of transformers 5.16."""

    class Cache(DynamicCache):
        def reset(self):
            for layer in self.layers:
                layer.keys.zero_()

    cache = Cache()
    cache.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), 0)

    host.empty_cache(cache)

    assert cache.get_seq_length() == 0


def test_a_renamed_setting_of_training_arguments_has_the_name_of_the_release(monkeypatch):
    assert host.training_setting("learning_rate") == "learning_rate"

    older = SimpleNamespace(__dataclass_fields__={"gradient_checkpointing_kwargs": None})
    monkeypatch.setattr("transformers.TrainingArguments", older)

    found = host.training_setting("activation_checkpointing_kwargs")
    assert found == "gradient_checkpointing_kwargs"


def load_releases():
    path = ROOT / "benchmarks" / "releases.py"
    spec = importlib.util.spec_from_file_location("releases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_unknown_release_is_refused_before_anything_is_built(monkeypatch, capsys):
    releases = load_releases()
    monkeypatch.setattr("sys.argv", ["releases.py", "latest"])

    with pytest.raises(SystemExit):
        releases.main()
    assert "three numbers, 'oldest' or 'newest', got 'latest'" in capsys.readouterr().err


def test_a_failing_release_fails_the_run_after_all_have_run(monkeypatch, capsys):
    releases, ran = load_releases(), []

    def run(release):
        ran.append(release)
        failed = ["tests.patching::test_it"] if release == "5.16.1" else []
        versions = dict.fromkeys(releases.PACKAGES, release)
        return {"versions": versions, "passed": 7, "skipped": 2, "failed": failed}

    monkeypatch.setattr(releases, "run", run)
    monkeypatch.setattr("sys.argv", ["releases.py", "5.16.1", "newest"])

    assert releases.main() == 1
    assert ran == ["5.16.1", "newest"]
    shown = capsys.readouterr().out
    assert "| 5.16.1 | 7 | 2 | 1 |" in shown
    assert "5.16.1: tests.patching::test_it" in shown


@pytest.mark.parametrize(("status", "failed"), [(0, []), (3, ["pytest ended with exit status 3"])])
def test_a_run_that_ended_without_a_report_is_no_success(status, failed, tmp_path):
    found = load_releases().read_report(tmp_path / "none.xml", status)

    assert found == {"passed": 0, "skipped": 0, "failed": failed}


def test_the_page_shows_what_was_recorded():
    recorded = ROOT / "benchmarks" / "results" / "releases.json"
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    results = json.loads(recorded.read_text())["results"]

    assert load_releases().render(results) in page
