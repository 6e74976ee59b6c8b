"""Skip-wise positions, shifted attention and mixed windows, against loops and explicit masks."""

import pytest
import torch
from conftest import TRAINED, logits, tiny_llama
from finetuning import recipe, training, write_model, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rope_ext import RopeError, load_pretrained, patch_model, unpatch_model
from hf_rope_ext.attention.shifted import NAME
from hf_rope_ext.finetune import finetune, position_skips, use_shifted_attention
from hf_rope_ext.finetune.build import patch, spare_short_requests
from hf_rope_ext.finetune.sequences import MixedWindows, collate
from hf_rope_ext.methods import DynamicYarn, LongRope, Yarn
from hf_rope_ext.rotary.installed import patch_of


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr("hf_rope_ext.finetune.run.plot_curve", lambda history, path: None)


FIRST, SKIP = 20, 150


def offsets(length=48):
    return torch.where(torch.arange(length) < FIRST, 0, SKIP)[None]


def reach(model, ids, **arguments):
    """How strongly the second chunk's loss depends on the first chunk's embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = ids.clone()
    labels[:, : FIRST + 1] = -100
    model(inputs_embeds=embedded, labels=labels, use_cache=False, **arguments).loss.backward()
    return float(embedded.grad[:, :FIRST].abs().max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_between_the_chunks_is_trained(attention, ids):
    """And as position_ids, the obvious way, it is cut without a word."""
    model = patch_model(tiny_llama(attn_implementation=attention), "yarn", factor=4)
    ids = ids[:1, :48]
    moved = torch.arange(48)[None] + offsets()

    assert reach(model, ids, position_ids=moved) == 0.0
    with position_skips(model) as skips:
        skips.set(offsets())
        assert reach(model, ids) > 1e-4


@pytest.mark.parametrize("method", ["yarn", "dynamic_yarn"])
def test_skipped_positions_are_the_positions_the_model_computes_with(method, ids):
    model = patch_model(tiny_llama(), method, factor=4)
    ids = ids[:, :48]
    both = torch.cat((offsets(), 0 * offsets()))
    moved = torch.arange(48)[None] + both
    # an explicit mask of ones keeps transformers from reading the jump as a border
    expected = logits(model, ids, position_ids=moved, attention_mask=torch.ones_like(ids))

    with position_skips(model) as skips:
        skips.set(both)
        found = logits(model, ids)
        skips.set(None)
        plain = logits(model, ids)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, logits(model, ids), rtol=0, atol=0)
    assert (found[0] - plain[0]).abs().max() > 0.1


def test_offsets_of_another_length_and_unpatched_models_are_refused(ids):
    with pytest.raises(RopeError, match="patched by patch_model"), position_skips(tiny_llama()):
        pass
    model = patch_model(tiny_llama(), "yarn", factor=4)
    with position_skips(model) as skips:
        skips.set(offsets(30))
        with pytest.raises(RopeError, match="for 30 tokens, but the forward pass has 200"):
            model(ids)
    assert logits(model, ids).shape[1] == 200


def test_a_run_with_skips_trains_far_distances_on_few_tokens(tmp_path):
    base, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    seen = []

    def watch(model):
        rotary = model.get_base_model().model.rotary_emb
        plain = rotary.forward

        def forward(x, position_ids=None):
            if model.get_base_model().training:
                seen.append((x.shape[1], int(position_ids.max())))
            return plain(x, position_ids)

        rotary.forward = forward

    import hf_rope_ext.finetune.run as module

    make_trainable = module.make_trainable
    with pytest.MonkeyPatch.context() as patch:

        def watched(model, how):
            wrapped = make_trainable(model, how)
            watch(wrapped)
            return wrapped

        patch.setattr(module, "make_trainable", watched)
        finetune(
            recipe(base, data, factor=4.0, pose_length=32),
            training(tmp_path / "out", save_strategy="no", eval_strategy="no"),
        )

    assert {length for length, _ in seen} == {32}
    assert max(position for _, position in seen) > 3 * TRAINED


# --- shifted sparse attention


def naive(query, key, value, groups, mask=None):
    """The same pattern, one number at a time."""
    batch, heads, length, width = query.shape
    size = length // groups
    repeats = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, width)
    for b in range(batch):
        for h in range(heads):
            shift = size // 2 if h >= heads - heads // 2 else 0
            for i in range(length):
                allowed = [
                    j
                    for j in range(i + 1)
                    if (i + shift) // size == (j + shift) // size
                    and (mask is None or bool(mask[b, 0, i, j]))
                ]
                if not allowed:
                    continue
                keys, values = key[b, h // repeats, allowed], value[b, h // repeats, allowed]
                weights = torch.softmax(keys @ query[b, h, i] / width**0.5, dim=0)
                out[b, i, h] = weights @ values
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_shifted_attention_is_the_pattern_it_says(padded, heads, kv_heads):
    from hf_rope_ext.attention.shifted import shifted_attention

    module = torch.nn.Module()
    module._hf_rope_groups = 4
    query = torch.randn(2, heads, 32, 6)
    key, value = torch.randn(2, kv_heads, 32, 6), torch.randn(2, kv_heads, 32, 6)
    mask = None
    if padded:
        mask = torch.ones(32, 32, dtype=torch.bool).tril().expand(2, 1, 32, 32).clone()
        mask[1, :, :, 27:] = False  # the second row ends early

    found, _ = shifted_attention(module, query, key, value, mask)

    expected = naive(query, key, value, 4, mask)
    kept = 27 if padded else 32
    torch.testing.assert_close(found[:, :kept], expected[:, :kept], rtol=1e-5, atol=1e-6)


def test_no_token_sees_a_later_one_or_another_group_and_half_the_heads_cross(ids):
    model = tiny_llama(num_hidden_layers=1)
    use_shifted_attention(model, 4)
    model.train()
    ids = ids[:1, :64]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, use_cache=False).logits

    def seen(position):
        (grad,) = torch.autograd.grad(out[0, position].sum(), embedded, retain_graph=True)
        return grad[0].abs().sum(-1).nonzero().flatten().tolist()

    assert seen(3) == [0, 1, 2, 3]
    assert seen(17) == list(range(8, 18))  # its own group from 16, the shifted heads' from 8
    assert seen(63) == list(range(48, 64))


def test_it_is_for_training_only_and_has_its_mask(ids):
    stock, model = tiny_llama(), tiny_llama()
    use_shifted_attention(model, 4)
    padded = torch.ones_like(ids)
    padded[0, :50] = 0

    for arguments in ({}, {"attention_mask": padded}):
        expected = logits(stock, ids, **arguments)
        torch.testing.assert_close(logits(model, ids, **arguments), expected, rtol=1e-4, atol=1e-5)
    model.train()
    assert (logits(model, ids) - logits(stock, ids)).abs().max() > 0.1
    # one row alone equals itself beside a padded one
    right = torch.ones(2, 64, dtype=torch.int64)
    right[1, 40:] = 0
    both = logits(model, ids[:, :64], attention_mask=right)
    torch.testing.assert_close(both[:1], logits(model, ids[:1, :64]), rtol=1e-4, atol=1e-5)


def test_what_shifted_attention_cannot_serve_is_refused(ids):
    with pytest.raises(RopeError, match="groups must be an integer of at least 2, got 1"):
        use_shifted_attention(tiny_llama(), 1)
    model = tiny_llama()
    use_shifted_attention(model, 4)
    model.train()
    with pytest.raises(RopeError, match="multiple of 8"):
        model(ids[:, :63])


def test_a_run_with_shifted_attention_evaluates_in_full(tmp_path, ids):
    base, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    done = finetune(recipe(base, data, shifted_groups=4), training(tmp_path / "out"))

    found = load_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        logits(found, ids), logits(done.model.eval(), ids), rtol=1e-4, atol=1e-5
    )
    assert done.after["perplexity_64"] < done.before["perplexity_64"]


# --- mixed windows


def test_short_windows_run_with_the_original_frequencies_and_long_ones_with_the_scaled(ids):
    stock, scaled, mixed = tiny_llama(), tiny_llama(), tiny_llama()
    patch_model(scaled, "linear", factor=4)
    geometry = patch_of(scaled).sites[0].geometry
    method = spare_short_requests(patch_of(scaled).method, geometry)
    patch_model(mixed, method)

    short, long = ids[:, :TRAINED], ids
    torch.testing.assert_close(logits(mixed, short), logits(stock, short), rtol=0, atol=0)
    torch.testing.assert_close(logits(mixed, long), logits(scaled, long), rtol=1e-4, atol=1e-4)
    assert isinstance(method, LongRope)
    follows = DynamicYarn(factor=4)
    assert spare_short_requests(follows, geometry) is follows
    assert spare_short_requests(Yarn(factor=4), geometry).attention_factor == 1.0


def test_a_run_with_mixed_windows_keeps_short_texts_as_they_are(tmp_path, ids):
    base, data = write_model(tmp_path / "base"), write_text(tmp_path / "data.jsonl")
    done = finetune(
        recipe(base, data, mixed_windows=0.5),
        training(tmp_path / "out", per_device_train_batch_size=1),
    )

    stock = AutoModelForCausalLM.from_pretrained(base).eval()
    with done.model.disable_adapter():
        found = logits(done.model.eval(), ids[:, :TRAINED])
    torch.testing.assert_close(found, logits(stock, ids[:, :TRAINED]), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size


class Counting:
    length = 8

    def __len__(self):
        return 200

    def __getitem__(self, index):
        row = torch.arange(8 * index, 8 * index + 8)[None]
        return {"input_ids": row, "labels": row}


def test_mixed_windows_cut_the_share_that_was_asked_for():
    found = [MixedWindows(Counting(), 4, 0.3, seed=0)[index] for index in range(200)]

    cut = [one for one in found if one["input_ids"].shape == (2, 4)]
    assert 40 <= len(cut) <= 80
    assert all(
        torch.equal(one["input_ids"].reshape(1, 8) % 8, torch.arange(8)[None]) for one in found
    )
    with pytest.raises(RopeError, match="per_device_train_batch_size=1"):
        collate([cut[0], next(one for one in found if one["input_ids"].shape == (1, 8))])
    with pytest.raises(RopeError, match="multiple of the trained length 3, got 8"):
        MixedWindows(Counting(), 3, 0.3, seed=0)
    with pytest.raises(RopeError, match=r"greater than 0 and less than 1, got 1\.5"):
        MixedWindows(Counting(), 4, 1.5, seed=0)


def test_every_stage_of_a_schedule_has_shifted_attention(tmp_path):
    model = tiny_llama()
    staged = recipe(
        tmp_path, tmp_path / "text", factor=None, shifted_groups=4, factor_schedule="2:1,4:1"
    )

    for factor, _ in staged.stages():
        patch(model, staged, factor)
        assert patch_of(model).method.factor == factor
        assert model.model.layers[0].self_attn._hf_rope_groups == 4
        assert model.config._attn_implementation == NAME

    unpatch_model(model)
    assert model.config._attn_implementation == tiny_llama().config._attn_implementation
