"""Every model type of the zoo: patched equals stock, and undoing leaves no trace."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from stock import LENGTH, REFUSED, arguments, check
from torch import nn
from transformers import PreTrainedConfig

from hf_rope_ext import UnsupportedModelError, patch_model, unpatch_model

SERVED = sorted(set(zoo.MODEL_TYPES) - REFUSED)
pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A batch of this size is faster so, and sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
PUBLISHED = RECORDED["results"]
# other releases have other types, and err elsewhere
SAME_RELEASE = RECORDED["versions"]["transformers"] == transformers.__version__


@pytest.mark.parametrize("model_type", SERVED)
def test_patched_equals_stock_as_published_and_unpatched_equals_before(model_type):
    found = check(model_type)

    assert found == PUBLISHED[model_type] or not SAME_RELEASE


@pytest.mark.skipif(not SAME_RELEASE, reason="the table is of another release")
def test_every_model_type_and_its_status_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()

    assert PUBLISHED.keys() == set(zoo.MODEL_TYPES)
    assert {name for name, how in PUBLISHED.items() if "refused" in how} == REFUSED
    for name in (*zoo.MODEL_TYPES, *zoo.UNBUILDABLE):
        assert f"`{name}`" in readme


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a patch could touch: modules by identity, tensors by value, configs."""
    configs = {
        path: module.config.to_dict()
        for path, module in model.named_modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    return {
        "modules": {path: id(module) for path, module in model.named_modules()},
        "tensors": {
            name: tensor.clone()
            for name, tensor in [*model.named_buffers(), *model.named_parameters()]
        },
        "scaling": {
            path: module.scaling
            for path, module in model.named_modules()
            if isinstance(getattr(module, "scaling", None), float)
        },
        "configs": configs,
        "keys": list(model.state_dict()),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("modules", "scaling", "configs", "keys"):
        assert found[part] == expected[part], part
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


# rotary modules that are no part of a text tower, or unscaled by design
LEFT_ALONE = {
    "CsmRotaryEmbedding": "depth_decoder",
    "DeepseekOcr2VisionRotaryEmbedding": "vision_tower",
    "Dots3NoteAudioRotaryEmbedding": "audio_tower",
    "EvollaSaProtRotaryEmbedding": "protein_encoder",
    "GlmAsrRotaryEmbedding": "audio_tower",
    "MimiRotaryEmbedding": "codec_model",
    "Molmo2RotaryEmbedding": "rotary_emb_unscaled",
    "MusicFlamingoRotaryEmbedding": "pos_emb",
    "PeAudioEncoderRotaryEmbedding": "audio_encoder",
    "VoxtralRealtimeRotaryEmbedding": "audio_tower",
    "VoxtralRealtimeTimeEmbedding": "time_embedding",
}


def is_text(path: str, module: nn.Module) -> bool:
    """Told without the code under test: rotary modules hold inv_freq, vision's are axial."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    holds = any(name.endswith("inv_freq") for name in names)
    elsewhere = LEFT_ALONE.get(type(module).__name__)
    # before transformers 5.18 nothing on them says so but their path
    axial = getattr(module, "rope_type", None) == "axial" or "visual." in path
    return holds and not axial and not (elsewhere and elsewhere in path)


@pytest.mark.parametrize("model_type", SERVED)
def test_a_patch_replaces_the_rotary_modules_of_the_text_alone_and_leaves_nothing(model_type):
    model = zoo.build(model_type)
    before, chosen = snapshot(model), arguments(model, model_type)
    own = {path for path, module in model.named_modules() if is_text(path, module)}

    patch_model(model, "yarn", **chosen)
    patched = snapshot(model)
    unpatch_model(model)

    assert patched["keys"] == before["keys"]  # checkpoints keep their form
    assert_same(snapshot(model), before)
    if model_type in zoo.FIXED_TABLE:
        return
    assert own
    for path, module in before["modules"].items():
        assert (patched["modules"].get(path) == module) == (path not in own), path
    for name, tensor in before["tensors"].items():
        if name.rpartition(".")[0] not in own:
            assert torch.equal(patched["tensors"][name], tensor), name
    assert_factor_one_changes_no_bit(model, chosen)


def assert_factor_one_changes_no_bit(model: nn.Module, chosen: dict[str, Any]) -> None:
    inputs = zoo.inputs(model, length=LENGTH)
    before = zoo.run(model, **inputs)

    patch_model(model, "yarn", **{**chosen, "factor": 1.0})

    assert torch.equal(zoo.run(model, **inputs), before)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_family_that_cannot_be_served_says_why(model_type):
    model = zoo.build(model_type)
    before = snapshot(model)

    with pytest.raises(UnsupportedModelError, match="is given no positions"):
        patch_model(model, "yarn", factor=4)

    assert_same(snapshot(model), before)


def test_every_rope_text_model_type_is_in_the_zoo():
    assert not set(zoo.MODEL_TYPES) & set(zoo.UNBUILDABLE)
    assert not set(zoo.MODEL_TYPES) & set(zoo.NO_TEXT_ROPE)
    assert set(zoo.MODEL_TYPES) >= zoo.FIXED_TABLE | REFUSED
