"""From files or a `datasets` dataset to tokens on disk, read as one stream."""

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

from hf_rope_ext.errors import RopeError

PIECE = 8192
"""Tokens of a row on disk; a longer document takes several, so that no read is large."""

FEW = 16
"""Fewer documents than this are held out by their end, not as a whole."""

BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""The builder of `datasets` that reads a file, by its suffix."""


SAVED = ("state.json", "dataset_dict.json")
"""Files that tell a directory from `save_to_disk` from one that holds data files."""


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Args:
        data: A file (text, JSONL, Parquet), a directory of a saved dataset or of such files, a
            dataset's hub id, or a `datasets.Dataset`.
        column: The column that holds the text, or for a chat the list of messages.
        separator: What ends a document inside a text file; None where a file is one document.
        chat: Whether ``column`` holds messages, for the tokenizer's chat template.
        split: Of a dataset that has several.
        answers_only: Whether only the assistant's tokens of a chat are predicted.
        cache: Directory for tokenised data; that of `datasets` if None.
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
    """Documents as one sequence of tokens, read piece by piece from disk.

    Args:
        rows: A dataset with a row for each piece of a document.
        order: The rows to read, in this order.
        ends: Where each of them ends in the stream.
        begin: First token of the rows that belongs to the stream.
        stop: One after the last.
        documents: Where each document starts in the stream, and at the end the length.
        masked: Whether the rows say which tokens are predicted.
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
        """Return tokens and whether each is predicted, ``(stop - start,)``, int64 and bool."""
        start, stop = start + self.begin, stop + self.begin
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        taken = self.rows[self.order[first : last + 1]]
        offset = int(self.ends[first - 1]) if first else 0
        inside = slice(start - offset, stop - offset)
        ids = torch.tensor(np.concatenate(taken["input_ids"])[inside], dtype=torch.int64)
        if not self.masked:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        return ids, torch.tensor(np.concatenate(taken["predicted"])[inside], dtype=torch.bool)

    def tokens(self) -> Tensor:
        """Return all tokens, int64, ``(tokens,)``."""
        return self.read(0, len(self))[0]


def load_documents(source: Source, tokenizer: Any) -> Any:
    """Return a dataset of tokenised pieces: ``input_ids``, ``document``, maybe ``predicted``.

    Tokenising goes from disk to disk, batch by batch, and is done once: the result is kept under a
    name made of the data, the tokenizer and the settings.

    Raises:
        RopeError: If there is nothing to read, or not in the form that ``source`` says.
    """
    from datasets.fingerprint import Hasher

    if source.cache is not None:
        try:
            source.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RopeError(f"cache: cannot make {str(source.cache)!r}: {error}") from error
    documents = _open(source)
    _require_column(documents, source)
    if source.chat and not getattr(tokenizer, "chat_template", None):
        raise RopeError("the tokenizer has no chat template; give the data as plain text.")
    what = (source.column, source.separator, source.chat, source.answers_only, PIECE)
    fingerprint = Hasher.hash((documents._fingerprint, _identity(tokenizer), what))
    file = None
    if source.cache is not None:
        file = str(source.cache / f"tokens-{fingerprint}.arrow")
    rows = documents.map(
        _Tokenise(tokenizer, source),
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=documents.column_names,
        new_fingerprint=fingerprint,
        cache_file_name=file,
        desc="tokenising",
    )
    if len(rows) == 0:
        raise RopeError(f"{_named(source)} holds no text.")
    return rows.with_format("numpy")


def _identity(tokenizer: Any) -> Any:
    """Return what a tokenizer's output depends on, which using it does not change."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    if not tokenizer.is_fast:
        return (repr(tokenizer), *special)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["truncation"] = settings["padding"] = None  # as the last call happened to set them
    return (json.dumps(settings), *special)


def split_stream(rows: Any, held_out: float, least: int = 1) -> tuple[Stream, Stream]:
    """Return the stream to train on and the one held out.

    Whole documents are held out, drawn at random but the same in every run, so that runs with
    different seeds can be compared; a few long ones are instead cut, and the end held out.

    Args:
        rows: What `load_documents` returned.
        held_out: Share of the tokens.
        least: Tokens the held-out stream needs.

    Raises:
        RopeError: If the text is too short for both.
    """
    if not 0 < held_out < 1:
        raise RopeError(f"held_out must be a share between 0 and 1, got {held_out!r}.")
    lengths = np.array([len(ids) for ids in _column(rows, "input_ids")], dtype=np.int64)
    document = np.concatenate([np.atleast_1d(own) for own in _column(rows, "document")])
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
            f"on the rest; give more text, shorter eval_lengths, or a smaller held_out."
        )

    def part(begin: int, stop: int) -> Stream:
        inside = starts[(starts > begin) & (starts < stop)]
        documents = np.concatenate(([begin], inside, [stop])) - begin
        return Stream(rows, order, ends, begin, stop, documents, "predicted" in rows.column_names)

    return part(0, border), part(border, total)


def _column(rows: Any, name: str) -> Iterator[Any]:
    for batch in rows.select_columns([name]).iter(batch_size=1024):
        yield from batch[name]


class _Tokenise:
    """From a batch of documents to pieces of tokens."""

    def __init__(self, tokenizer: Any, source: Source) -> None:
        self.tokenizer = tokenizer
        self.source = source

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"input_ids": [], "document": []}
        if self.source.answers_only:
            found["predicted"] = []
        for index, value in zip(indices, batch[self.source.column], strict=True):
            for part, (ids, predicted) in enumerate(self._documents(value)):
                for start in range(0, len(ids), PIECE):
                    found["input_ids"].append(ids[start : start + PIECE])
                    # documents of one row of the source stay apart
                    found["document"].append((index << 24) + part)
                    if self.source.answers_only:
                        found["predicted"].append(predicted[start : start + PIECE])
        return found

    def _documents(self, value: Any) -> Iterator[tuple[list[int], list[int]]]:
        """Yield tokens and what of them is predicted, for each document in one value."""
        if self.source.chat:
            yield self._chat(value)
            return
        if not isinstance(value, str):
            raise RopeError(
                f"column {self.source.column!r} of {_named(self.source)} holds "
                f"{type(value).__name__}, not text."
            )
        separator = self.source.separator
        for text in value.split(separator) if separator else [value]:
            ids = self.tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
            if ids:
                start = self.tokenizer.bos_token_id
                whole = ids if start is None else [start, *ids]
                end = self.tokenizer.eos_token_id
                if start is None and end is not None:
                    whole = [*whole, end]  # without a beginning, the end marks the border
                yield whole, []

    def _chat(self, messages: Any) -> tuple[list[int], list[int]]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=self.source.answers_only,
            )
        except Exception as error:  # a template raises what it likes
            raise RopeError(f"the chat template cannot read {messages!r}: {error}") from error
        predicted = encoded["assistant_masks"] if self.source.answers_only else []
        if self.source.answers_only and not any(predicted):
            raise RopeError(
                "the chat template does not mark the assistant's tokens ({% generation %}), so "
                "answers_only cannot be served; set it to false."
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
            found = load_from_disk(str(path))
        elif path.is_dir() or (path.suffix not in BUILDERS and not path.is_file()):
            found = load_dataset(str(source.data), cache_dir=cache)
        else:
            found = None
        if isinstance(found, DatasetDict):
            return _split(found, source)
        if found is not None:
            return found
        if path.suffix not in BUILDERS:
            raise RopeError(
                f"{_named(source)} is not one of {', '.join(BUILDERS)}; rename or convert it."
            )
        if path.suffix != ".parquet":
            _require_utf8(path)
        elif path.stat().st_size == 0:
            raise RopeError(f"{_named(source)} is empty.")
        options = {"sample_by": "document"} if BUILDERS[path.suffix] == "text" else {}
        return load_dataset(
            BUILDERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, **options
        )
    except RopeError:
        raise
    except Exception as error:  # each builder raises its own
        reason = str(error.__cause__ or error).splitlines()[0]
        raise RopeError(f"cannot read {_named(source)}: {reason}") from error


def _split(found: Any, source: Source) -> Any:
    if source.split not in found:
        raise RopeError(
            f"{_named(source)} has no split {source.split!r}; it has {', '.join(found)}; choose "
            f"with dataset_split."
        )
    return found[source.split]


def _require_utf8(path: Path) -> None:
    if not path.is_file():
        raise RopeError(f"there is no file {str(path)!r}.")
    decoder = codecs.getincrementaldecoder("utf-8")()
    empty, done = True, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            try:
                empty = not decoder.decode(chunk).strip() and empty
            except UnicodeDecodeError as error:
                raise RopeError(
                    f"{str(path)!r} is not UTF-8: byte {done + error.start} is "
                    f"0x{error.object[error.start]:02x}; convert it first."
                ) from error
            done += len(chunk)
    if empty:
        raise RopeError(f"{str(path)!r} is empty.")


def _require_column(documents: Any, source: Source) -> None:
    columns: Sequence[str] = documents.column_names
    if source.column not in columns:
        raise RopeError(
            f"{_named(source)} has no column {source.column!r}; it has {', '.join(columns)}."
        )
    if "position_ids" in columns:
        raise RopeError(
            f"{_named(source)} brings its own position_ids. Positions that restart within a "
            f"sequence show the model no long distance; leave them out, and documents are joined."
        )


def _named(source: Source) -> str:
    return repr(source.data) if isinstance(source.data, str | Path) else "the dataset"
