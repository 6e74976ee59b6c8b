"""Whatever is patched, replaced, nested, undone or fails on the way: the model ends as promised."""

import copy
import threading
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch
import transformers
import zoo
from conftest import logits, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rope_ext import (
    AlreadyScaledError,
    NotPatchedError,
    RopeError,
    UnsupportedModelError,
    VisualPositions,
    patch_model,
    patched,
    unpatch_model,
)
from hf_rope_ext.changes import AddHooks, Change, SetAttributes, apply_all, revert_all
from hf_rope_ext.finetune import use_shifted_attention
from hf_rope_ext.models.find import find_towers
from hf_rope_ext.patching import patch as patching
from hf_rope_ext.rotary.installed import SwapRotary, patch_of

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")

# every kind of change is in one of these patches
PATCHES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_5_vl": {
        "text": {
            "static": {"method": "yarn", "factor": 4, "temperature": "logits"},
            "planned": {
                "method": "dynamic_yarn",
                "factor": 4,
                "visual_positions": VisualPositions(factor={"t": 4}),
            },
            "layout": {"method": "linear", "factor": 2, "mrope_layout": "interleaved"},
        },
        "vision": {
            "static": {"method": "ntk", "factor": 2, "original_max_position_embeddings": 8},
            "planned": {"method": "linear", "factor": 2, "original_max_position_embeddings": 8},
            "layout": {"method": "base", "rope_theta": 3e4, "original_max_position_embeddings": 8},
        },
    },
    "deepseek_v3": {
        "text": {
            "static": {"method": "yarn", "factor": 4, "mscale": 0.7, "mscale_all_dim": 1.0},
            "planned": {"method": "dynamic_ntk", "factor": 4},
            "layout": {"method": "yarn", "factor": 2, "temperature": "logits"},
        },
    },
    "gptj": {
        "text": {
            "static": {"method": "yarn", "factor": 4},
            "planned": {"method": "dynamic_linear", "factor": 4},
            "layout": {"method": "ntk", "factor": 4},
        },
    },
}
NAMES = ("static", "planned", "layout")
try:
    find_towers(zoo.build("qwen2_5_vl"))
except UnsupportedModelError:
    assert transformers.__version__ < "5.17"
    del PATCHES["qwen2_5_vl"]["vision"]


class InjectedError(Exception):
    """Raised by a change that is made to fail."""


class Failing:
    """A change that fails, before or after it has done its work."""

    def __init__(self, change: Change, late: bool) -> None:
        self.change = change
        self.late = late

    def apply(self) -> None:
        if self.late:
            self.change.apply()
        raise InjectedError

    def revert(self) -> None:
        self.change.revert()


def configs_of(model: nn.Module) -> list[Any]:
    return list(
        {
            id(part.config): part.config for part in model.modules() if hasattr(part, "config")
        }.values()
    )


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that a patch can touch, as values that do not depend on which copy it is."""
    found: dict[str, Any] = {"configs": [repr(config.to_dict()) for config in configs_of(model)]}
    found["attention"] = [config._attn_implementation for config in configs_of(model)]
    for path, part in model.named_modules():
        plain = {
            name: type(value).__name__ if callable(value) else repr(value)
            for name, value in vars(part).items()
            if name in ("scaling", "training", "generate", "get_rope_index", "_hf_rope_groups")
            or name.startswith("_prepare")
        }
        hooks = [
            getattr(hook, "__qualname__", type(hook).__name__)
            for table in (part._forward_pre_hooks, part._forward_hooks)
            for hook in table.values()
        ]
        flags = [
            len(part._forward_pre_hooks_with_kwargs),
            len(part._forward_hooks_with_kwargs),
            len(part._forward_hooks_always_called),
        ]
        found[path] = (type(part).__name__, plain, hooks, flags)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        found[f"tensor {name}"] = (str(tensor.dtype), tensor.detach().flatten().tolist()[:64])
    return found


@cache
def expected(family: str, text: str | None, vision: str | None, groups: int | None) -> dict:
    """The state of a fresh model that was patched so at once."""
    model = zoo.build(family)
    for target, name in (("text", text), ("vision", vision)):
        if name is not None:
            patch_model(model, target=target, probe=False, **PATCHES[family][target][name])
    if groups is not None:
        use_shifted_attention(model, groups)
    return state(model)


class Run:
    """Does what a sequence says to a model, and keeps what is promised of it."""

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.family = family
        self.monkeypatch = monkeypatch
        self.model = zoo.build(family)
        self.stock = {path: id(part) for path, part in self.model.named_modules()}
        self.names: dict[str, str | None] = {"text": None, "vision": None}
        self.groups: int | None = None

    def check(self) -> None:
        names = self.names
        assert state(self.model) == expected(
            self.family, names["text"], names["vision"], self.groups
        )
        if not any(names.values()):
            assert {path: id(part) for path, part in self.model.named_modules()} == self.stock

    def arguments(self, target: str, name: str) -> dict[str, Any]:
        return {"target": target, "probe": False, **PATCHES[self.family][target][name]}

    def do(self, steps: list[Any]) -> None:
        for kind, *rest in steps:
            getattr(self, kind)(*rest)
            self.check()

    def patch(self, target: str, name: str, replace: bool) -> None:
        if target not in PATCHES[self.family]:
            return
        arguments = self.arguments(target, name)
        if self.names[target] is not None and not replace:
            with pytest.raises(AlreadyScaledError):
                patch_model(self.model, **arguments)
            return
        patch_model(self.model, replace=replace, **arguments)
        self.set(target, name)

    def set(self, target: str, name: str | None) -> None:
        self.names[target] = name
        if target == "text":
            self.groups = None

    def fail(self, target: str, name: str, number: int, late: bool) -> None:
        """Patch, but one of the changes fails."""
        if target not in PATCHES[self.family]:
            return
        listed = patching._changes

        def broken(*args: Any) -> list[Change]:
            changes = listed(*args)
            place = number % len(changes)
            changes[place] = Failing(changes[place], late)
            return changes

        with self.monkeypatch.context() as patch:
            patch.setattr(patching, "_changes", broken)
            with pytest.raises(InjectedError):
                patch_model(self.model, replace=True, **self.arguments(target, name))

    def undo(self, target: str | None) -> None:
        targets = [target] if target else ["text", "vision"]
        if not any(self.names[target] for target in targets):
            with pytest.raises(NotPatchedError):
                unpatch_model(self.model, target)
            return
        unpatch_model(self.model, target)
        for target in targets:
            self.set(target, None)

    def shift(self, groups: int) -> None:
        if self.family == "gptj" or self.names["text"] is None:
            return
        use_shifted_attention(self.model, groups)
        self.groups = groups

    def edit(self, name: str) -> None:
        """Somebody edits or deletes what the patch wrote into the config."""
        config = zoo.text_config(self.model.config)
        if self.names["text"] is None or self.groups is not None:
            return
        if name == "delete":
            del config.hf_rope_ext
        else:
            if hasattr(config, "rope_parameters"):  # GPT-J has none
                config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
            config.max_position_embeddings = 5
        unpatch_model(self.model, "text")
        self.set("text", None)

    def block(self, target: str, name: str, replace: bool, fails: bool, inner: list[Any]) -> None:
        if target not in PATCHES[self.family]:
            return
        before, groups = self.names[target], self.groups
        arguments = self.arguments(target, name)
        if before is not None and not replace:
            with pytest.raises(AlreadyScaledError), patched(self.model, **arguments):
                pass
            return
        with suppress(InjectedError), patched(self.model, replace=replace, **arguments):
            self.set(target, name)
            self.check()
            self.do(inner)
            if fails:
                raise InjectedError
        self.names[target] = before
        if target == "text":
            self.groups = groups


targets = st.sampled_from(["text", "text", "vision"])
names = st.sampled_from(NAMES)
replaces = st.sampled_from([True, True, False])
simple = st.one_of(
    st.tuples(st.just("patch"), targets, names, replaces),
    st.tuples(st.just("fail"), targets, names, st.integers(0, 30), st.booleans()),
    st.tuples(st.just("undo"), st.sampled_from([None, "text", "vision"])),
    st.tuples(st.just("shift"), st.sampled_from([2, 4])),
    st.tuples(st.just("edit"), st.sampled_from(["delete", "change"])),
)


def blocks(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(
        st.just("block"), targets, names, replaces, st.booleans(), st.lists(inner, max_size=3)
    )


steps = st.lists(
    st.one_of(simple, blocks(st.one_of(simple, blocks(simple)))), min_size=2, max_size=5
)
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
@given(family=st.sampled_from(list(PATCHES)), sequence=steps)
def test_a_model_is_what_a_sequence_of_patches_promises(family, sequence, monkeypatch):
    Run(family, monkeypatch).do(sequence)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=SUPPRESSED)
@given(family=st.sampled_from(list(PATCHES)), sequence=steps)
def test_a_model_is_what_many_sequences_of_patches_promise(family, sequence, monkeypatch):
    Run(family, monkeypatch).do(sequence)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when it was done"])
@pytest.mark.parametrize(("family", "target"), [(f, t) for f in PATCHES for t in PATCHES[f]])
def test_a_failure_at_any_change_leaves_the_patch_that_was_there(family, target, late, monkeypatch):
    run = Run(family, monkeypatch)
    run.patch(target, "static", False)
    for name in NAMES:
        model = zoo.build(family)
        patch_model(model, **run.arguments(target, name))
        for number in range(len(patch_of(model, target).changes)):
            run.fail(target, name, number, late)
            run.check()


def test_the_patches_above_hold_every_kind_of_change(monkeypatch):
    kinds, attributes = set(), set()
    for family, by_target in PATCHES.items():
        for target in by_target:
            for name in NAMES:
                run = Run(family, monkeypatch)
                run.patch(target, name, False)
                run.shift(4)
                for change in patch_of(run.model, target).changes:
                    kinds.add(type(change).__name__)
                    if isinstance(change, SetAttributes):
                        attributes |= set(change.values)

    assert kinds == {
        "SwapRotary", "SetAttributes", "AddHooks", "ShiftedAttention", "RecordAdapters",
    }  # fmt: skip
    assert attributes >= {
        "scaling",
        "generate",
        "_prepare_cache_for_generation",
        "_prepare_position_ids_for_generation",
        "get_rope_index",
        "rope_parameters",
        "max_position_embeddings",
        "hf_rope_ext",
    }


def test_what_cannot_be_reverted_does_not_keep_the_rest(llama, ids):
    expected = logits(llama, ids)
    patch_model(llama, "yarn", factor=4)
    changes = patch_of(llama).changes

    class Stuck:
        def apply(self) -> None: ...

        def revert(self) -> None:
            raise InjectedError

    changes.insert(1, Stuck())
    changes.append(Stuck())

    with pytest.raises(InjectedError):
        unpatch_model(llama)

    assert torch.equal(logits(llama, ids), expected)
    assert patch_of(llama) is None
    assert state(llama) == state(tiny_llama())


def test_somebodys_edits_survive_a_failed_replacement(llama):
    patch_model(llama, "yarn", factor=4)
    llama.config.max_position_embeddings = 99
    del llama.config.hf_rope_ext

    with pytest.raises(RopeError):
        patch_model(llama, "longrope", factor=4, long_factor=[1.0] * 3, replace=True)

    assert llama.config.max_position_embeddings == 99
    assert not hasattr(llama.config, "hf_rope_ext")
    assert llama.config.rope_parameters["rope_type"] == "yarn"


def test_a_method_put_on_the_instance_by_somebody_stays(llama):
    def generate(*args: Any, **kwargs: Any) -> str:
        return "mine"

    llama.generate = generate
    patch_model(llama, "dynamic_yarn", factor=4)

    assert llama.generate() == "mine"
    unpatch_model(llama)
    assert llama.generate is generate


def test_a_move_and_a_mode_within_a_block_reach_the_patch_that_comes_back(llama, ids):
    patch_model(llama, "yarn", factor=4)
    expected = logits(llama, ids)
    with patched(llama, "linear", factor=2, replace=True):
        llama.to(torch.float64)
        llama.train()

    rotary = llama.model.rotary_emb
    assert rotary.training
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(logits(llama.float().eval(), ids), expected)


def test_a_copy_is_undone_on_its_own_hooks_included(monkeypatch):
    run = Run("qwen2_5_vl", monkeypatch)
    run.patch("text", "planned", False)
    run.shift(4)
    twin = copy.deepcopy(run.model)
    before = state(twin)

    unpatch_model(run.model)
    assert state(twin) == before
    unpatch_model(twin)

    assert state(twin) == expected("qwen2_5_vl", None, None, None)


def test_shifted_attention_goes_with_the_patch(llama, ids):
    implementation = llama.config._attn_implementation
    use_shifted_attention(llama, 4)
    use_shifted_attention(llama, 2)
    assert llama.config._attn_implementation != implementation

    unpatch_model(llama)

    assert state(llama) == state(tiny_llama())
    assert not hasattr(llama.model.layers[0].self_attn, "_hf_rope_groups")


def test_every_config_gets_its_own_attention_back():
    model = zoo.build("qwen2_5_vl")
    model.config.vision_config._attn_implementation = "eager"
    before = state(model)

    use_shifted_attention(model, 4)
    unpatch_model(model)

    assert state(model) == before


def test_shifted_attention_asks_for_a_patch_where_the_config_scales(llama):
    model = tiny_llama({"rope_type": "linear", "factor": 2.0})
    before = state(model)

    with pytest.raises(RopeError, match="patch it first"):
        use_shifted_attention(model, 4)

    assert state(model) == before


def test_hooks_of_others_stay_and_attributes_of_configs_go_by_their_stored_name():
    module = nn.Linear(2, 2)
    other = module.register_forward_hook(lambda *args: None)
    hooks = AddHooks(module, lambda *args: None, lambda *args: None)
    apply_all([hooks])
    revert_all([hooks])
    assert list(module._forward_hooks) == [other.id]
    assert not module._forward_hooks_with_kwargs
    assert not module._forward_pre_hooks

    seen = []
    hooks = AddHooks(module, lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    apply_all([hooks])
    with pytest.raises(RuntimeError):
        module(torch.zeros(3))  # of another width
    assert seen == ["before", "after"]

    config = zoo.config("gptj")
    assert config.attribute_map["max_position_embeddings"] == "n_positions"
    before = config.to_dict()
    change = SetAttributes(config, {"max_position_embeddings": 7, "added": 1})
    change.apply()
    assert config.n_positions == 7
    change.revert()
    assert config.to_dict() == before
    assert not hasattr(config, "added")


def test_a_change_that_was_never_applied_reverts_to_nothing(llama):
    patch_model(llama, "yarn", factor=4)
    changes = patch_of(llama).changes
    unpatch_model(llama)
    before = state(llama)

    revert_all(changes)

    assert state(llama) == before
    assert any(isinstance(change, SwapRotary) for change in changes)


def test_threads_find_a_model_patched_or_not_and_never_in_between():
    model, ids = tiny_llama(), torch.arange(10, 30)[None]
    before, config = logits(model, ids), model.config.to_dict()
    errors = []

    def serve(method: str) -> None:
        for _ in range(10):
            try:
                with patched(model, method, factor=4):
                    logits(model, ids)
            except AlreadyScaledError:
                pass
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("yarn", "ntk", "linear")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config
