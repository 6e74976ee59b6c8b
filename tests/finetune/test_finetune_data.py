"""Documents to tokens to sequences, against tokenising and joining by hand."""

import itertools
import json

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from finetuning import byte_tokenizer, documents

from hf_rope_ext import RopeError
from hf_rope_ext.finetune.documents import PIECE, Source, load_documents, split_stream
from hf_rope_ext.finetune.sequences import Sequences, SkipWise

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet():
    import datasets

    datasets.disable_progress_bars()


def by_hand(texts):
    return [[0, *(byte + 1 for byte in encoded(one))] for one in texts]


def encoded(text):
    tokenizer = byte_tokenizer()
    return [token - 1 for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def tokens(rows):
    found = {}
    for ids, document in zip(rows["input_ids"], rows["document"], strict=True):
        found.setdefault(int(document), []).extend(ids.tolist())
    return list(found.values())


def stream(texts, held_out=0.2, least=1):
    rows = load_documents(Source(Dataset.from_dict({"text": texts})), byte_tokenizer())
    return split_stream(rows, held_out, least)


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet", "directory", "dataset"])
def test_every_form_of_the_same_text_gives_the_same_tokens(form, tmp_path):
    texts = [*documents(5), "", "ünïcödé"]
    data = Dataset.from_dict({"text": texts})
    path = tmp_path / f"data.{form}"
    if form == "txt":
        path.write_text("<|end|>".join(texts), encoding="utf-8")
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    elif form == "parquet":
        data.to_parquet(path)
    elif form == "directory":
        data.save_to_disk(path)
    source = Source(
        data if form == "dataset" else str(path),
        separator="<|end|>" if form == "txt" else None,
        cache=tmp_path / "cache",
    )

    rows = load_documents(source, byte_tokenizer())

    assert tokens(rows) == by_hand([one for one in texts if one])


@pytest.mark.parametrize("saved", [True, False])
def test_a_directory_has_splits_and_they_are_named(saved, tmp_path):
    """As `save_to_disk` writes it, or with a Parquet file for each split, as on the hub."""
    parts = {"train": documents(3), "validation": ["held out"]}
    data = {name: Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    path = tmp_path / "data"
    if saved:
        DatasetDict(data).save_to_disk(path)
    else:
        path.mkdir()
        for name, part in data.items():
            part.to_parquet(path / f"{name}.parquet")

    def load(split):
        source = Source(str(path), split=split, cache=tmp_path / "cache")
        return tokens(load_documents(source, byte_tokenizer()))

    assert load("train") == by_hand(documents(3))
    assert load("validation") == by_hand(["held out"])
    with pytest.raises(RopeError, match="set dataset_split to one of train, validation"):
        load("test")


def test_tokenising_is_done_once(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    source = Source(str(path), cache=tmp_path / "cache")
    first = tokens(load_documents(source, byte_tokenizer()))
    tokenizer = byte_tokenizer()
    tokenizer("used before", truncation=True, max_length=3)
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda *args, **kwargs: pytest.fail("tokenised again")
    )

    assert tokens(load_documents(source, tokenizer)) == first


def test_the_cache_is_not_used_for_other_text(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("some text")
    load_documents(Source(str(path), cache=cache), byte_tokenizer())
    path.write_text("other words")

    found = load_documents(Source(str(path), cache=cache), byte_tokenizer())

    assert tokens(found) == by_hand(["other words"])


def test_a_long_document_is_read_whole_from_its_pieces():
    text = "x" * (2 * PIECE + 100) + "y" * 50
    train, held = stream([text], held_out=0.1)

    assert len(held) == round(0.1 * (len(text) + 1))
    assert torch.cat((train.tokens(), held.tokens())).tolist() == by_hand([text])[0]
    assert train.read(PIECE - 3, PIECE + 3)[0].tolist() == by_hand([text])[0][PIECE - 3 : PIECE + 3]


def test_documents_are_held_out_whole_and_none_twice():
    texts = [f"{number} " * (20 + number) for number in range(30)]
    train, held = stream(texts)

    def split(part):
        borders = part.documents.tolist()
        every = part.tokens().tolist()
        return [every[a:b] for a, b in itertools.pairwise(borders)]

    assert sorted(split(train) + split(held)) == sorted(by_hand([one.strip() for one in texts]))
    assert 0.2 <= len(held) / (len(train) + len(held)) < 0.3
    assert split(train) == split(stream(texts)[0])


def test_joined_sequences_are_the_stream_in_order():
    train, _ = stream(documents())
    found = Sequences(train, 128)

    joined = torch.cat([found[index]["input_ids"][0] for index in range(len(found))])

    torch.testing.assert_close(joined, train.tokens()[: len(joined)], rtol=0, atol=0)
    assert len(train) - len(joined) < 128
    assert found[0]["labels"].tolist() == found[0]["input_ids"].tolist()


def test_cut_sequences_stay_within_a_document():
    texts = [chr(97 + number) * (100 + 40 * number) for number in range(20)]
    train, _ = stream(texts)
    found = Sequences(train, 128, "cut")

    rows = [found[index]["input_ids"][0].tolist() for index in range(len(found))]

    assert rows
    assert all(len(set(row) - {0}) == 1 for row in rows)
    assert sum(0 in row for row in rows) == sum(
        length >= 128 for length in train.documents[1:] - train.documents[:-1]
    )


def test_restarting_positions_are_refused():
    train, _ = stream(documents())
    with pytest.raises(RopeError, match="restart positions at every document"):
        Sequences(train, 128, "restart")
    data = Dataset.from_dict({"text": ["a"], "position_ids": [[0]]})
    with pytest.raises(RopeError, match="restart"):
        load_documents(Source(data), byte_tokenizer())


def chat_tokenizer(marks):
    tokenizer = byte_tokenizer()
    inner = "{{ message.content }}"
    answer = "{% generation %}" + inner + "{% endgeneration %}" if marks else inner
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        + inner
        + "{% else %}"
        + answer
        + "{% endif %}{% endfor %}"
    )
    return tokenizer


def chat():
    pair = [{"role": "user", "content": "ask" * 30}, {"role": "assistant", "content": "yes" * 30}]
    return Dataset.from_dict({"messages": [pair] * 20})


def test_only_answers_are_predicted_where_asked_for():
    source = Source(chat(), column="messages", chat=True, answers_only=True)
    train, _ = split_stream(load_documents(source, chat_tokenizer(True)), 0.2)

    example = Sequences(train, 180)[0]

    kept = example["labels"][0] != -100
    assert kept.sum() == 90
    assert byte_tokenizer().decode(example["input_ids"][0][kept]) == "yes" * 30


def test_a_template_that_does_not_mark_answers_is_refused_for_them():
    source = Source(chat(), column="messages", chat=True, answers_only=True)
    with pytest.raises(RopeError, match="does not mark"):
        load_documents(source, chat_tokenizer(False))
    with pytest.raises(RopeError, match="no chat template"):
        load_documents(Source(chat(), column="messages", chat=True), byte_tokenizer())


def test_what_cannot_be_read_is_named(tmp_path):
    latin, empty, other = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.csv"
    latin.write_bytes(b"na" + "ïve".encode("latin-1"))
    empty.write_text(" \n")
    other.write_text("a,b\n")
    broken = tmp_path / "d.jsonl"
    broken.write_text('{"text": "a"}\n{"text":\n')
    for path, match in (
        (latin, "not UTF-8: byte 2 is 0xef"),
        (empty, "empty"),
        (other, "is not one of"),
        (broken, "cannot read"),
        (tmp_path / "none.txt", "no file"),
    ):
        with pytest.raises(RopeError, match=match):
            load_documents(Source(str(path), cache=tmp_path / "cache"), byte_tokenizer())
    with pytest.raises(RopeError, match="cache: cannot create"):
        load_documents(Source(str(broken), cache=empty / "cache"), byte_tokenizer())
    with pytest.raises(RopeError, match="no column 'text'; it has words"):
        load_documents(Source(Dataset.from_dict({"words": ["a"]})), byte_tokenizer())
    with pytest.raises(RopeError, match="holds int, not text"):
        load_documents(Source(Dataset.from_dict({"text": [1]})), byte_tokenizer())
    with pytest.raises(RopeError, match="holds no text"):
        load_documents(Source(Dataset.from_dict({"text": ["", ""]})), byte_tokenizer())


def test_too_little_text_is_said_with_numbers():
    with pytest.raises(RopeError, match="too few to hold out 5000"):
        stream(documents(3), least=5000)
    train, _ = stream(documents(20))
    with pytest.raises(RopeError, match=r"no sequence of 100000 tokens: it has \d+ in all"):
        Sequences(train, 100_000)
    with pytest.raises(RopeError, match="its longest document has"):
        Sequences(train, 5000, "cut")
    for share in (0, 1, -0.5):
        with pytest.raises(RopeError, match="held_out"):
            stream(documents(3), held_out=share)


def test_skips_keep_text_and_positions_together():
    train, _ = stream(documents())
    sequences = Sequences(train, 512)
    found = SkipWise(sequences, 64, seed=3)
    seen = set()
    for index in range(len(found)):
        example = found[index]
        positions = torch.arange(64) + example["position_offsets"][0]
        whole = sequences[index // 8]["input_ids"][0]

        assert example["input_ids"][0].tolist() == whole[positions].tolist()
        border = int((positions.diff() > 1).nonzero()[0]) + 1 if positions[-1] > 63 else 0
        assert border <= 32
        if border:
            assert example["labels"][0, border] == -100
        assert int((example["labels"] == -100).sum()) == int(border > 0)
        seen.add(int(positions[-1]))
    assert max(seen) > 450
    assert len(seen) > len(found) // 2
    assert (
        found[5]["position_offsets"].tolist()
        == SkipWise(sequences, 64, 3)[5]["position_offsets"].tolist()
    )


def test_saved_data_is_not_changed_by_reading(tmp_path):
    Dataset.from_dict({"text": documents(3)}).save_to_disk(tmp_path / "d")
    load_documents(Source(str(tmp_path / "d"), cache=tmp_path / "c"), byte_tokenizer())

    assert load_from_disk(str(tmp_path / "d"))["text"][:] == documents(3)
