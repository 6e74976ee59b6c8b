"""Sequences cut from a stream of numbers, where every token tells its own place."""

import pytest
import torch
import zoo
from conftest import logits, tiny_llama

from hf_rope_ext import RopeError, patch_model
from hf_rope_ext.finetune.pose import PositionSkips, position_skips
from hf_rope_ext.finetune.sequences import MixedWindows, Sequences, SkipWise, collate


class Numbers:
    """A stream in which token ``n`` is ``n``, of documents of given sizes."""

    def __init__(self, *sizes, unpredicted=()):
        self.documents = torch.tensor([0, *sizes]).cumsum(0)
        self.unpredicted = unpredicted

    def __len__(self):
        return int(self.documents[-1])

    def read(self, start, end):
        ids = torch.arange(start, end)
        return ids, torch.tensor([number not in self.unpredicted for number in ids.tolist()])


def first_tokens(sequences):
    return [int(example["input_ids"][0, 0]) for example in sequences]


@pytest.mark.parametrize(("packing", "starts"), [("join", [0, 10, 20, 30]), ("cut", [0, 19, 29])])
def test_sequences_start_one_after_the_other(packing, starts):
    # of 10 tokens exactly, one too few, two and one more, and the rest
    found = Sequences(Numbers(10, 9, 21, 5), 10, packing)
    assert first_tokens(found[index] for index in range(len(found))) == starts
    assert all(found[index]["input_ids"].shape == (1, 10) for index in range(len(found)))


def test_documents_are_joined_unless_told():
    assert len(Sequences(Numbers(5, 5), 10)) == 1


@pytest.mark.parametrize("size", [9, 1])
def test_a_text_one_token_short_is_refused_with_its_size(size):
    assert len(Sequences(Numbers(size + 1), size + 1, "cut")) == 1
    with pytest.raises(
        RopeError, match=f"no sequence of {size + 1} tokens: its longest document has {size};"
    ):
        Sequences(Numbers(size, size), size + 1, "cut")
    with pytest.raises(RopeError, match=rf"{size + 1} tokens: it has {size} in all; use more"):
        Sequences(Numbers(size), size + 1)


def test_a_packing_is_one_of_two():
    with pytest.raises(RopeError, match="packing must be one of 'join', 'cut', got 'mix'"):
        Sequences(Numbers(10), 5, "mix")
    with pytest.raises(RopeError, match="use 'join' or 'cut'"):
        Sequences(Numbers(10), 5, "restart")


def test_what_is_not_predicted_has_no_label():
    found = Sequences(Numbers(10, unpredicted=(6, 7)), 5)
    assert found[0]["labels"].tolist() == [[0, 1, 2, 3, 4]]
    assert found[1]["labels"].tolist() == [[5, -100, -100, 8, 9]]


@pytest.mark.parametrize(("target", "length", "samples"), [(40, 10, 4), (40, 15, 2), (40, 40, 1)])
def test_every_token_is_trained_on_once_on_average(target, length, samples):
    sequences = Sequences(Numbers(3 * target), target)
    found = SkipWise(sequences, length, seed=0)
    assert len(found) == 3 * samples
    for index in range(len(found)):
        ids = found[index]["input_ids"]
        assert ids.shape == (1, length)
        assert ids.min() // target == ids.max() // target == index // samples


@pytest.mark.parametrize("length", [7, 8])
def test_a_skip_comes_after_at_most_half_and_reaches_both_ends(length):
    target = 12
    found = SkipWise(Sequences(Numbers(400 * target, unpredicted=(3,)), target), length, seed=1)
    firsts, skips = set(), set()
    for index in range(len(found)):
        example = found[index]
        offsets, ids = example["position_offsets"][0], example["input_ids"][0]
        skip = int(offsets[-1])
        first = int((offsets < skip).sum()) if skip else None
        assert torch.equal(ids % target, torch.arange(length) + offsets)
        expected = ids.clone()
        if skip:
            assert offsets.tolist() == [0] * first + [skip] * (length - first)
            expected[first] = -100
            firsts.add(first)
        expected[ids == 3] = -100
        assert torch.equal(example["labels"][0], expected)
        skips.add(skip)
    assert firsts == set(range(1, (length + 1) // 2 + 1))
    assert skips == set(range(target - length + 1))


def test_skips_follow_from_seed_and_index_alone():
    sequences = Sequences(Numbers(4000), 400)
    offsets = [
        [SkipWise(sequences, 40, seed)[index]["position_offsets"].tolist() for index in range(20)]
        for seed in (1, 1, 2)
    ]
    assert offsets[0] == offsets[1] != offsets[2]
    assert len({str(one) for one in offsets[0]}) > 15


def test_a_training_length_is_from_two_tokens_to_the_target():
    sequences = Sequences(Numbers(100), 50)
    assert len(SkipWise(sequences, 50, 0)[0]["input_ids"][0]) == 50
    assert len(SkipWise(sequences, 2, 0)[0]["input_ids"][0]) == 2
    for wrong in (1, 51):
        with pytest.raises(RopeError, match="pose_length must be an integer from 2 to 50, in tok"):
            SkipWise(sequences, wrong, 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_sequences_is_cut_short(share):
    sequences = Sequences(Numbers(12 * 500), 12)
    found = MixedWindows(sequences, 4, share, seed=0)
    assert len(found) == 500
    cut = 0
    for index in range(len(found)):
        example, whole = found[index], sequences[index]
        rows = len(example["input_ids"])
        assert example.keys() == whole.keys()
        for name, tensor in example.items():
            assert tensor.shape == ((1, 12) if rows == 1 else (3, 4))
            assert torch.equal(tensor.flatten(), whole[name].flatten())
        cut += rows == 3
    assert abs(cut / 500 - share) < 0.07
    again = [len(MixedWindows(sequences, 4, share, seed=0)[index]["labels"]) for index in range(50)]
    other = [len(MixedWindows(sequences, 4, share, seed=1)[index]["labels"]) for index in range(50)]
    assert again == [len(found[index]["labels"]) for index in range(50)]
    assert again != other


def test_a_share_lies_between_none_and_all_and_windows_fill_the_sequence():
    sequences = Sequences(Numbers(120), 12)
    for wrong in (0, 1, -0.1):
        with pytest.raises(
            RopeError, match=r"mixed_windows must be .* greater than 0 and less than 1"
        ):
            MixedWindows(sequences, 4, wrong, 0)
    with pytest.raises(RopeError, match="multiple of the trained length 5, got 12"):
        MixedWindows(sequences, 5, 0.5, 0)


def test_a_batch_has_rows_of_one_length():
    long = {"input_ids": torch.zeros(1, 12), "labels": torch.ones(1, 12)}
    short = {"input_ids": torch.zeros(3, 4), "labels": torch.ones(3, 4)}

    batch = collate([short, short])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (6, 4),
        "labels": (6, 4),
    }
    assert torch.equal(batch["labels"], torch.ones(6, 4))
    with pytest.raises(RopeError, match="per_device_train_batch_size=1"):
        collate([long, short])


OFFSETS = torch.tensor([[0, 0, 5]])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x", torch.tensor([[0, 1, 2]]), "more"), {"other": 1}),
        (("x",), {"position_ids": torch.tensor([[0, 1, 2]]), "other": 1}),
    ],
)
def test_positions_are_shifted_wherever_they_are_passed(args, kwargs):
    skips = PositionSkips()
    assert skips(None, args, kwargs) == (args, kwargs)
    skips.set(OFFSETS)

    found_args, found_kwargs = skips(None, args, kwargs)

    found = [*found_args, *found_kwargs.values()]
    assert [one for one in found if not isinstance(one, torch.Tensor)] == [
        one for one in (*args, *kwargs.values()) if not isinstance(one, torch.Tensor)
    ]
    assert [one.tolist() for one in found if isinstance(one, torch.Tensor)] == [[[0, 1, 7]]]
    assert found_kwargs.keys() == kwargs.keys()
    skips.set(OFFSETS[:, :2])
    with pytest.raises(RopeError, match="for 2 tokens, but the forward pass has 3"):
        skips(None, args, kwargs)


def test_skips_end_with_their_block(ids):
    model = patch_model(tiny_llama(), "yarn", factor=4)
    expected = logits(model, ids)
    with position_skips(model) as skips:
        assert torch.equal(logits(model, ids), expected)
        skips.set(torch.arange(ids.shape[1])[None])
        shifted = logits(model, ids)
    assert not torch.allclose(shifted, expected)
    assert torch.equal(logits(model, ids), expected)


def test_skips_need_a_patch_and_angles_that_follow_positions():
    table = patch_model(zoo.build("gptj"), "linear", factor=2)
    for wrong in (tiny_llama(), table):
        with pytest.raises(RopeError, match="need a model patched by"), position_skips(wrong):
            pass
