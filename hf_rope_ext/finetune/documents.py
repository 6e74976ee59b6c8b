"""Tokenize files or a `datasets` dataset on disk, and read the tokens as one stream."""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_rope_ext.checks import require_number
from hf_rope_ext.errors import RopeError

PIECE = 8192
"""Tokens per row on disk; a longer document takes several rows, so that no read is large."""

FEW = 16
"""With fewer documents than this, the end of the text is held out, not whole documents."""

BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""The builder of `datasets` for each file suffix."""

SAVED = ("state.json", "dataset_dict.json")
"""Files that mark a directory as written by `save_to_disk`."""


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        data: A text, JSONL or Parquet file, a directory of such files or of a saved dataset, the
            hub id of a dataset, or a `datasets.Dataset`.
        column: The column with the text, or with the messages of a chat.
        separator: Separates documents within a text file; None if a file is one document.
        chat: Whether ``column`` holds messages to format with the chat template.
        split: Which split of a dataset to read.
        answers_only: Whether only the assistant's tokens of a chat are predicted.
        cache: Directory for tokenized data; the cache of `datasets` if None.
    """

    data: Any
    column: str = "text"
    separator: str | None = None
    chat: bool = False
    split: str = "train"
    answers_only: bool = False
    cache: Path | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """Documents as one sequence of tokens, read from disk on demand.

    Args:
        rows: A dataset with one row per piece of a document.
        order: Indices of the rows, in the order of the stream.
        ends: Token offset at which each of them ends.
        begin: Token offset at which the stream begins.
        stop: Token offset at which it ends, exclusive.
        documents: Where each document starts in the stream; the last entry is its length.
        masked: Whether the rows mark the tokens that are predicted.
    """

    rows: Any
    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    begin: int
    stop: int
    documents: NDArray[np.int64]
    masked: bool

    def __len__(self) -> int:
        return self.stop - self.begin

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return tokens, int64, and which are predicted, bool, both ``(stop - start,)``."""
        start, stop = start + self.begin, stop + self.begin
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        rows = self.rows[self.order[first : last + 1]]
        offset = int(self.ends[first - 1]) if first else 0
        inside = slice(start - offset, stop - offset)
        ids = torch.tensor(np.concatenate(rows["input_ids"])[inside], dtype=torch.int64)
        if not self.masked:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        return ids, torch.tensor(np.concatenate(rows["predicted"])[inside], dtype=torch.bool)

    def tokens(self) -> Tensor:
        """Return all tokens, int64, ``(tokens,)``."""
        return self.read(0, len(self))[0]


def load_documents(source: Source, tokenizer: Any) -> Any:
    """Return a dataset of tokenized pieces: ``input_ids``, ``document``, maybe ``predicted``.

    Tokenization streams from disk to disk and runs once: the result is cached under a hash of the
    data, the tokenizer and the settings.

    Raises:
        RopeError: If there is nothing to read, or it is not what ``source`` describes.
    """
    from datasets.fingerprint import Hasher

    if source.cache is not None:
        try:
            source.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RopeError(f"cache: cannot create {str(source.cache)!r}: {error}") from error
    documents = _open(source)
    _require_column(documents, source)
    if source.chat and not getattr(tokenizer, "chat_template", None):
        raise RopeError("the tokenizer has no chat template; provide the data as plain text.")
    settings = (source.column, source.separator, source.chat, source.answers_only, PIECE)
    fingerprint = Hasher.hash((documents._fingerprint, _identify(tokenizer), settings))
    file = None
    if source.cache is not None:
        file = str(source.cache / f"tokens-{fingerprint}.arrow")
    rows = documents.map(
        _Tokenizer(tokenizer, source),
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=documents.column_names,
        new_fingerprint=fingerprint,
        cache_file_name=file,
        desc="tokenizing",
    )
    if len(rows) == 0:
        raise RopeError(f"{_describe(source)} holds no text.")
    return rows.with_format("numpy")


def _identify(tokenizer: Any) -> Any:
    """Return everything that a tokenizer's output depends on, unchanged by its use."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    if not tokenizer.is_fast:
        return (repr(tokenizer), *special)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["truncation"] = settings["padding"] = None  # left over from the last call
    return (json.dumps(settings), *special)


def split_stream(rows: Any, held_out: float, least: int = 1) -> tuple[Stream, Stream]:
    """Return the training stream and the held-out stream.

    Whole documents are held out, at random but the same in every run, so that runs with different
    seeds can be compared. Of only a few documents, the end of the text is held out instead.

    Args:
        rows: The result of `load_documents`.
        held_out: Share of the tokens to hold out.
        least: Tokens to hold out at least.

    Raises:
        RopeError: If the text is too short for both streams.
    """
    require_number("held_out", held_out, above=0, below=1)
    lengths = np.array([len(ids) for ids in _read_column(rows, "input_ids")], dtype=np.int64)
    document = np.concatenate([np.atleast_1d(number) for number in _read_column(rows, "document")])
    total = int(lengths.sum())
    wanted = max(round(held_out * total), least)
    names, number = np.unique(document, return_inverse=True)
    if len(names) >= FEW:
        rank = np.random.default_rng(0).permutation(len(names))
        order = np.argsort(rank[number], kind="stable")
    else:
        order = np.arange(len(document))
    ends = np.cumsum(lengths[order])
    border = total - wanted
    starts = (ends - lengths[order])[np.flatnonzero(np.diff(document[order], prepend=-1))]
    if len(names) >= FEW:
        border = int(starts[np.searchsorted(starts, border, side="right") - 1]) if border > 0 else 0
    if border < 1:
        raise RopeError(
            f"the text has {total} tokens: too few to hold out {wanted} for evaluation and train "
            f"on the rest; use more text, shorter eval_lengths, or a smaller held_out."
        )

    def cut(begin: int, stop: int) -> Stream:
        inside = starts[(starts > begin) & (starts < stop)]
        documents = np.concatenate(([begin], inside, [stop])) - begin
        return Stream(rows, order, ends, begin, stop, documents, "predicted" in rows.column_names)

    return cut(0, border), cut(border, total)


def _read_column(rows: Any, name: str) -> Iterator[Any]:
    for batch in rows.select_columns([name]).iter(batch_size=1024):
        yield from batch[name]


class _Tokenizer:
    """Maps a batch of documents to pieces of tokens."""

    def __init__(self, tokenizer: Any, source: Source) -> None:
        self.tokenizer = tokenizer
        self.source = source

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        pieces: dict[str, list[Any]] = {"input_ids": [], "document": []}
        if self.source.answers_only:
            pieces["predicted"] = []
        for index, value in zip(indices, batch[self.source.column], strict=True):
            for part, (ids, predicted) in enumerate(self._documents(value)):
                for start in range(0, len(ids), PIECE):
                    pieces["input_ids"].append(ids[start : start + PIECE])
                    # several documents in one source row keep distinct numbers
                    pieces["document"].append((index << 24) + part)
                    if self.source.answers_only:
                        pieces["predicted"].append(predicted[start : start + PIECE])
        return pieces

    def _documents(self, value: Any) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the tokens of each document in a value, and for a chat which are predicted."""
        if self.source.chat:
            yield self._chat(value)
            return
        if not isinstance(value, str):
            raise RopeError(
                f"column {self.source.column!r} of {_describe(self.source)} holds "
                f"{type(value).__name__}, not text."
            )
        separator = self.source.separator
        for text in value.split(separator) if separator else [value]:
            ids = self.tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            if ids:
                start = self.tokenizer.bos_token_id
                end = self.tokenizer.eos_token_id
                if start is not None:
                    ids = [start, *ids]
                elif end is not None:  # without a start token, the end token marks the border
                    ids = [*ids, end]
                yield ids, []

    def _chat(self, messages: Any) -> tuple[list[int], list[int]]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=self.source.answers_only,
            )
        except Exception as error:  # templates raise errors of any type
            raise RopeError(f"the chat template cannot format {messages!r}: {error}") from error
        predicted = encoded["assistant_masks"] if self.source.answers_only else []
        if self.source.answers_only and not any(predicted):
            raise RopeError(
                "the chat template does not mark the assistant's tokens ({% generation %}); "
                "set answers_only to false."
            )
        return list(encoded["input_ids"]), list(predicted)


def _open(source: Source) -> Any:
    """Return the documents as a `datasets.Dataset`."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if isinstance(source.data, Dataset):
        return source.data
    path = Path(source.data)
    cache = None if source.cache is None else str(source.cache)
    try:
        if any((path / name).is_file() for name in SAVED):
            dataset = load_from_disk(str(path))
        elif path.is_dir() or (path.suffix not in BUILDERS and not path.is_file()):
            dataset = load_dataset(str(source.data), cache_dir=cache)
        else:
            return _open_file(path, source)
        return _choose_split(dataset, source) if isinstance(dataset, DatasetDict) else dataset
    except RopeError:
        raise
    except Exception as error:  # builders raise errors of any type
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise RopeError(f"cannot read {_describe(source)}: {reason}") from error


def _open_file(path: Path, source: Source) -> Any:
    from datasets import load_dataset

    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise RopeError(
            f"{_describe(source)} is not one of {', '.join(BUILDERS)}; rename or convert it."
        )
    if builder != "parquet":
        _require_utf8(path)
    elif path.stat().st_size == 0:
        raise RopeError(f"{_describe(source)} is empty.")
    options = {"sample_by": "document"} if builder == "text" else {}
    cache = None if source.cache is None else str(source.cache)
    return load_dataset(builder, data_files=str(path), split="train", cache_dir=cache, **options)


def _choose_split(dataset: Any, source: Source) -> Any:
    if source.split not in dataset:
        raise RopeError(
            f"{_describe(source)} has no split {source.split!r}; set dataset_split to one of "
            f"{', '.join(dataset)}."
        )
    return dataset[source.split]


def _require_utf8(path: Path) -> None:
    if not path.is_file():
        raise RopeError(f"there is no file {str(path)!r}.")
    decoder = codecs.getincrementaldecoder("utf-8")()
    empty, offset = True, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            try:
                empty = not decoder.decode(chunk).strip() and empty
            except UnicodeDecodeError as error:
                raise RopeError(
                    f"{str(path)!r} is not UTF-8: byte {offset + error.start} is "
                    f"0x{error.object[error.start]:02x}; convert it first."
                ) from error
            offset += len(chunk)
    if empty:
        raise RopeError(f"{str(path)!r} is empty.")


def _require_column(documents: Any, source: Source) -> None:
    columns: Sequence[str] = documents.column_names
    if source.column not in columns:
        raise RopeError(
            f"{_describe(source)} has no column {source.column!r}; it has {', '.join(columns)}."
        )
    if "position_ids" in columns:
        raise RopeError(
            f"{_describe(source)} has its own position_ids. Positions that restart within a "
            f"sequence never show the model a long distance; remove that column."
        )


def _describe(source: Source) -> str:
    return repr(source.data) if isinstance(source.data, str | Path) else "the dataset"
