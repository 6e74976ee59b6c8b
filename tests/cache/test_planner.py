"""Forward calls: which plan a call gets, what outgrows it, and that it compiles."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINED, logits, relative, tiny_llama
from decoding import CACHE, dynamic, frozen, step_by_step, text
from method_knobs import PER_REQUEST
from transformers import DynamicCache, StaticCache

from hf_rope_ext import RopeError, planned, request_plan
from hf_rope_ext.models import host

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.RopeWarning")


def test_a_planned_loop_equals_the_full_forward():
    ids = text(1, 200)
    with planned(200):
        found, _ = step_by_step(dynamic(), ids, 40)

    assert relative(found, logits(frozen("dynamic_yarn", 200), ids)) < 1e-5


def test_a_cache_of_fixed_size_is_planned_for_its_size():
    model, ids = dynamic(), text(1, 150)
    cache = StaticCache(config=model.config, max_cache_len=180)

    found, _ = step_by_step(model, ids, 40, cache)

    assert relative(found, logits(frozen("dynamic_yarn", 180), ids)) < 1e-5


def test_within_the_trained_length_a_loop_is_bit_identical_to_the_unpatched_one():
    ids = text(1, TRAINED)

    found, cache = step_by_step(dynamic(), ids, 30)

    assert torch.equal(found, step_by_step(tiny_llama(), ids, 30)[0])
    assert request_plan(cache).factors == [1.0]


@pytest.mark.parametrize("growth", ["rerotate", "error", "freeze"])
@pytest.mark.parametrize("filled_by", ["patched", "unpatched"])
def test_a_loop_grows_within_the_trained_length_whatever_the_policy(growth, filled_by):
    """Plans within the trained length are one, and so is a cache without a plan."""
    model, stock, ids = dynamic(on_growth=growth), tiny_llama(), text(1, TRAINED + 1)
    with torch.no_grad():
        first = model if filled_by == "patched" else stock
        cache = first(ids[:, :30], use_cache=True)[CACHE]
        found = [model(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(30, TRAINED)]
        held = cache.layers[0].keys.clone()
        if growth == "error" or (filled_by == "unpatched" and growth == "rerotate"):
            reason = "planned for 64" if growth == "error" else "30 tokens that were not computed"
            with pytest.raises(RopeError, match=reason):
                model(ids[:, TRAINED:], **{CACHE: cache})
    assert torch.equal(held, cache.layers[0].keys)
    assert torch.equal(torch.cat(found, dim=1), step_by_step(stock, ids, 30)[0][:, 30:TRAINED])


def test_outgrowing_a_plan_can_be_an_error_and_changes_nothing():
    model, ids = dynamic(on_growth="error"), text(1, 100)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
        before = cache.layers[0].keys.clone()
        with pytest.raises(RopeError, match="planned for 100 tokens"):
            model(ids[:, :1], **{CACHE: cache})

    assert torch.equal(cache.layers[0].keys, before)
    assert logits(model, ids).isfinite().all()


def test_freezing_keeps_the_first_plan():
    ids = text(1, 150)

    found, cache = step_by_step(dynamic(on_growth="freeze"), ids, 100)

    assert request_plan(cache).lengths.tolist() == [100]
    assert relative(found, logits(frozen("dynamic_yarn", 100), ids)) < 1e-5


def test_growth_goes_in_geometric_steps():
    plans = []
    model = dynamic(on_plan=lambda plan: plans.append(plan.lengths.tolist()))

    step_by_step(model, text(1, 250), 30)

    assert plans == [
        [30],
        [64],
        [71],
        [78],
        [86],
        [94],
        [104],
        [114],
        [125],
        [138],
        [151],
        [166],
        [183],
        [201],
        [221],
        [244],
        [268],
    ]


def test_another_methods_cache_is_refused():
    ids = text(1, 80)
    with torch.no_grad():
        stranger = tiny_llama()(ids, use_cache=True)[CACHE]
        other = dynamic("dynamic_ntk")(ids, use_cache=True)[CACHE]
        with pytest.raises(RopeError, match="holds 80 tokens that were not computed under"):
            dynamic()(ids[:, :1], **{CACHE: stranger})
        with pytest.raises(RopeError, match="filled under DynamicNTK"):
            dynamic()(ids[:, :1], **{CACHE: other})


def test_another_batch_is_refused():
    model = dynamic()
    positions = torch.arange(80).expand(3, -1)
    with torch.no_grad():
        cache = model(text(3, 80), position_ids=positions, use_cache=True)[CACHE]
        with pytest.raises(RopeError, match="planned for 3 rows, but 2 came"):
            model(text(2, 1), position_ids=torch.full((2, 1), 80), **{CACHE: cache})


def test_a_reset_or_cropped_cache_is_planned_and_recorded_anew():
    model, ids = dynamic(), text(1, 100)
    with torch.no_grad():
        cache = model(text(1, 150), use_cache=True)[CACHE]
        host.empty_cache(cache)
        model(ids, **{CACHE: cache})
        assert request_plan(cache).lengths.tolist() == [100]
        cache.crop(-30)
        model(ids[:, 70:], **{CACHE: cache})
    expected = logits(model, ids)

    with torch.no_grad():
        again = model(ids[:, -1:], **{CACHE: _cropped(cache)}).logits
    assert relative(again[:, -1], expected[:, -1]) < 1e-5


def _cropped(cache):
    cache.crop(-1)
    return cache


def test_a_wrong_planned_length_is_refused():
    for wrong in (0, -1, 2.5, "100", True):
        with (
            pytest.raises(RopeError, match="max_length must be a positive integer"),
            planned(wrong),
        ):
            pass


def test_a_failed_forward_leaves_no_request_behind():
    model, ids = dynamic(), text(1, 100)
    expected = logits(model, ids)
    with pytest.raises(IndexError):
        model(torch.full((1, 100), 10_000))

    assert torch.equal(logits(model, ids), expected)


def test_a_paged_cache_is_refused():
    with pytest.raises(RopeError, match="cannot serve a paged cache"):
        dynamic().model(text(1, 10), cache=SimpleNamespace())


@pytest.mark.sweep
@pytest.mark.parametrize("method", PER_REQUEST)
def test_making_a_plan_never_waits_for_the_device(method):
    """A value fetched from the device would break the graph."""
    torch._dynamo.reset()
    model, ids = dynamic(method, buckets=2), text(2, 150)
    whole = torch.compile(model, fullgraph=True, backend="eager")

    with torch.no_grad():
        found = whole(ids, use_cache=False).logits

    assert torch.equal(found, logits(model, ids))


@pytest.mark.sweep
def test_the_decode_step_compiles_whole_and_does_not_compile_again_as_it_grows():
    torch._dynamo.reset()
    model, ids = dynamic(), text(1, 120)
    cache = StaticCache(config=model.config, max_cache_len=130)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    expected, _ = step_by_step(model, ids, 40, StaticCache(config=model.config, max_cache_len=130))
    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        model(ids[:, :40], **{CACHE: cache})
        found = [
            step(ids[:, at : at + 1], **{CACHE: cache}, position_ids=torch.tensor([[at]])).logits
            for at in range(40, 120)
        ]

    assert len(graphs) <= 2
    assert relative(torch.cat(found, dim=1), expected[:, 40:]) < 1e-5


@pytest.mark.sweep
def test_a_growing_cache_in_a_planned_loop_compiles_whole():
    torch._dynamo.reset()
    model, ids = dynamic(), text(1, 120)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad(), planned(120):
        expected, _ = step_by_step(model, ids, 40)
        cache = model(ids[:, :40], use_cache=True)[CACHE]
        found = [step(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(40, 120)]

    assert len(graphs) <= 3
    assert relative(torch.cat(found, dim=1), expected[:, 40:]) < 1e-5


def test_an_exported_program_follows_the_length_or_is_refused(monkeypatch):
    model, ids = dynamic(), text(1, 100)
    if not model.model.rotary_emb.takes_rows:
        pytest.skip(
            "before transformers 5.19 torch exports a call of one length alone, and says so"
        )
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"input_ids": {1: length}, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes
    )
    for size in (40, 150):
        longer = text(1, size)
        with torch.no_grad():
            found = program.module()(input_ids=longer, use_cache=False).logits
        assert relative(found, logits(model, longer)) < 1e-5

    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    cache = DynamicCache(config=model.config)
    with pytest.raises(RopeError, match="an exported program would keep the plan of its sample"):
        model(ids, **{CACHE: cache})
    assert cache.get_seq_length() == 0
