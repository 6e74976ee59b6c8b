"""Whole requests as data, how they are run, and how long each of their rows is reckoned to be.

A request is a batch of rows and what is done with them in turn: generated from, continued by hand,
cropped, reordered. `Session` does it with one model, as a user would. `reckon` says, from the
numbers of positions alone, for which length the plan of each row has to be, and whether it may be
refused.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from decoding import CACHE
from drawn_models import (
    END,
    IMAGE,
    KINDS,
    LLAVA_TOKENS,
    SPECIAL,
    START,
    TRAINED,
    VIDEO,
    WORDS,
    Kind,
)
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from hf_rope_ext import planned

LEAP = 7
MOST_GROWTH = 1.1
"""How much more than needed a cache is planned for that has outgrown its plan."""


@dataclass(frozen=True)
class Image:
    """An image, in tokens along its sides; LLaVA's all have four tokens."""

    rows: int = 2
    columns: int = 4

    @property
    def size(self) -> int:
        """Tokens that it takes at most, with those around it."""
        return 2 + self.rows * self.columns


@dataclass(frozen=True)
class Video:
    """A video, in frames, and tokens along their sides."""

    frames: int = 3
    rows: int = 2
    columns: int = 2

    @property
    def size(self) -> int:
        """Tokens that it takes at most, with those around its frames."""
        return self.frames * (2 + self.rows * self.columns)


Parts = tuple[int | Image | Video, ...]
"""A text: numbers of words, and images and videos between them."""


@dataclass(frozen=True)
class Generate:
    """A call of ``generate``.

    Args:
        new: Number of tokens it adds.
        said: What is added to every row before it; the first turn has the rows of the request.
        whole: Whether it is handed the whole text, or only what the cache lacks.
        decoding: How it decodes.
        chunk: Its ``prefill_chunk_size``.
        embeds: Whether it is handed embeddings in place of ids.
        again: Whether images of earlier turns are passed again, where the plan does not cover the
            text and the cache must be filled again.
        masked: Whether it is handed a mask though nothing is padded.
    """

    new: int = 3
    said: Parts = ()
    whole: bool = True
    decoding: str = "greedy"
    chunk: int | None = None
    embeds: bool = False
    again: bool = False
    masked: bool = True


@dataclass(frozen=True)
class Forward:
    """A forward by hand, planned for itself.

    Args:
        said: What is added to every row before it.
        positions: ``"none"`` where the model counts; ``"mask"`` for those that count no padding;
            ``"leap"`` for such that leave some out.
        embeds: Whether it is handed embeddings in place of ids.
        as_tuple: Whether it returns a tuple.
        masked: Whether it is handed a mask though nothing is padded.
    """

    said: Parts = ()
    positions: str = "mask"
    embeds: bool = False
    as_tuple: bool = False
    masked: bool = True


@dataclass(frozen=True)
class Loop:
    """A loop by hand in a block of `planned`, on an empty cache.

    Args:
        said: What is added to every row before it.
        chunk: Number of tokens that it prefills at a time; None for all at once.
        steps: Number of tokens that it adds.
        more: Number of tokens that the block is for beyond those.
        positions: As in `Forward`, without leaps.
    """

    said: Parts = ()
    chunk: int | None = None
    steps: int = 2
    more: int = 0
    positions: str = "mask"


@dataclass(frozen=True)
class Crop:
    """Removes the last tokens from the cache."""

    tokens: int


@dataclass(frozen=True)
class Rows:
    """Reorders, selects or repeats the rows of the cache.

    Args:
        how: The method: ``"reorder_cache"``, ``"batch_select_indices"`` or
            ``"batch_repeat_interleave"``.
    """

    how: str


@dataclass(frozen=True)
class Reset:
    """Empties the cache for another text."""


Turn = Generate | Forward | Loop | Crop | Rows | Reset


@dataclass(frozen=True)
class Request:
    """A request.

    Args:
        kind: The model, a key of `KINDS`.
        method: The method it is patched with.
        rows: The rows of the batch.
        turns: What is done.
        side: The side on which shorter rows are padded.
        cache: ``"none"``, ``"its own"`` where the model makes it, ``"dynamic"`` or ``"static"``.
        room: Tokens of a static cache beyond those needed.
        on_growth: The policy of the patch.
        beside: What goes on in the same process.
    """

    kind: str
    rows: tuple[Parts, ...]
    turns: tuple[Turn, ...]
    method: str = "dynamic_yarn"
    side: str = "left"
    cache: str = "its own"
    room: int = 0
    on_growth: str = "rerotate"
    beside: str = "nothing"


@dataclass
class Written:
    """A row as far as it is written: its own tokens, without padding."""

    seed: int
    model: Kind
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)  # time, row, column
    next: int = 0
    pad: int = 0
    offset: int | None = None  # of positions from tokens, as the model notes it of a prompt
    pixels: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    videos: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, parts: Parts) -> None:
        for part in parts:
            generator = torch.Generator().manual_seed(1000 * self.seed + len(self.ids))
            if isinstance(part, int):
                self._tokens(_words(part, generator))
            elif isinstance(part, Video):
                self._video(part, generator)
            else:
                self._tokens([START])
                self._image(part, generator)
                self._tokens([END])

    def count_on(self) -> None:
        """Go on behind what is written, as the model does in a later call."""
        if self.offset is not None:
            self.next = len(self.ids) + self.offset

    @property
    def is_grid(self) -> bool:
        return self.model.images == "grid"

    @property
    def is_placed(self) -> bool:
        """Whether images or videos take positions along a grid."""
        return bool(self.grids or self.videos)

    @property
    def longest(self) -> int:
        """Its largest position + 1."""
        return max((max(place) for place in self.places), default=-1) + 1

    def leap(self, places: int) -> None:
        self.next += places

    def cut(self, tokens: int) -> None:
        """Keep the first tokens."""
        self.ids, self.kinds = self.ids[:tokens], self.kinds[:tokens]
        self.places = self.places[:tokens]
        self.next = self.places[-1][0] + 1 if self.places else 0

    def append(self, token: int) -> None:
        self._tokens([token])

    @property
    def by_hand(self) -> bool:
        """Whether its positions are others than those that the model would count."""
        counted = [(place, place, place) for place in range(len(self.places))]
        return bool(self.videos) or (not self.grids and self.places != counted)

    def _tokens(self, ids: list[int]) -> None:
        self.ids += ids
        self.kinds += [0] * len(ids)
        self.places += [(place,) * 3 for place in range(self.next, self.next + len(ids))]
        self.next += len(ids)

    def _image(self, image: Image, generator: torch.Generator) -> None:
        if not self.is_grid:
            self._tokens([IMAGE] * LLAVA_TOKENS)
            self.kinds[-LLAVA_TOKENS:] = [1] * LLAVA_TOKENS
            self.pixels.append(torch.randn(3, 16, 16, generator=generator))
            return
        self._grid(IMAGE, 1, (0,), image.rows, image.columns)
        self.grids.append((1, 2 * image.rows, 2 * image.columns))
        self.pixels.append(_patches(image.rows * image.columns, generator))

    def _video(self, video: Video, generator: torch.Generator) -> None:
        times = tuple(range(0, video.frames * self.model.interval, self.model.interval))
        token = IMAGE if self.model.same_token else VIDEO
        for span in [times] if self.model.video == "whole" else [(0,)] * video.frames:
            self._tokens([START])
            self._grid(token, 2, span, video.rows, video.columns)
            self._tokens([END])
        self.videos.append((video.frames, 2 * video.rows, 2 * video.columns))
        self.frames.append(_patches(video.frames * video.rows * video.columns, generator))

    def _grid(self, token: int, kind: int, times: Sequence[int], rows: int, columns: int) -> None:
        places = [
            (self.next + time, self.next + row, self.next + column)
            for time in times
            for row in range(rows)
            for column in range(columns)
        ]
        self.ids += [token] * len(places)
        self.kinds += [kind] * len(places)
        self.places += places
        self.next += max(rows, columns)  # however long a video is


def _patches(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randn(4 * tokens, 3 * 2 * 16 * 16, generator=generator)


def _words(count: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randint(len(WORDS), (count,), generator=generator).tolist()
    return [WORDS[number] for number in drawn]


@dataclass
class Found:
    """What a turn says of one row: scores after its tokens from ``start`` on.

    Args:
        row: The row as it is afterwards.
        source: Number of the row of the session it comes from.
        start: Index of the token after which the first scores come.
        scores: ``(tokens, vocabulary)``, or ``(classes,)``.
    """

    row: Written
    source: int
    start: int
    scores: Tensor


class Session:
    """One model and one conversation with it.

    Args:
        model: The model.
        request: The request.
        drafting: The model that drafts for it.
        judge: A logits processor, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        drafting: nn.Module,
        judge: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.request, self.drafting, self.judge = model, request, drafting, judge
        self.kind: Kind = KINDS[request.kind]
        self.rows = [Written(seed, self.kind) for seed in range(len(request.rows))]
        self.cache: Any = None
        self.cached = 0
        self.shown = 0  # images and videos of each row that the cache holds
        self.is_first = True
        self.shows_again = False  # whether earlier images are passed again

    @property
    def width(self) -> int:
        return max(row.pad + len(row.ids) for row in self.rows)

    def say(self, turn: Generate | Forward | Loop) -> None:
        """Write what a turn adds to the rows, and where."""
        for row, parts in zip(
            self.rows,
            self.request.rows if self.is_first else [turn.said] * len(self.rows),
            strict=True,
        ):
            if isinstance(turn, Forward) and turn.positions == "leap":
                row.leap(LEAP)
            if isinstance(turn, Generate) and not row.is_placed:
                row.next = len(row.ids)
            row.count_on()
            row.add(parts)
            if row.is_placed and row.offset is None:
                row.offset = row.longest - len(row.ids)
        if self.is_first:
            longest = max(len(row.ids) for row in self.rows)
            counts = getattr(turn, "positions", "mask") != "none" or any(
                row.is_placed for row in self.rows
            )
            counts &= not self.kind.counts_columns
            for row in self.rows:
                row.pad = longest - len(row.ids) if self.request.side == "left" else 0
                if not counts:  # stock counts columns
                    row.places = [(place[0] + row.pad,) * 3 for place in row.places]
                    row.next += row.pad
            self.cache = self._new_cache(longest)
        self.is_first = False

    def do(self, turn: Turn) -> list[Found]:
        if isinstance(turn, Generate):
            found = self._generate(turn)
        elif isinstance(turn, Forward):
            found = self._forward(turn)
        elif isinstance(turn, Loop):
            found = self._loop(turn)
        else:
            self._change(turn)
            return []
        if self.cache is not None:
            self.cached = int(self.cache.get_seq_length())
        self.shown = len(self.rows[0].pixels) + len(self.rows[0].frames)
        return found

    def _new_cache(self, longest: int) -> Any:
        config = self.model.config.get_text_config()
        if self.request.cache == "dynamic":
            return DynamicCache(config=config)
        if self.request.cache == "static":
            return StaticCache(config=config, max_cache_len=self.size)
        return None

    @property
    def size(self) -> int:
        """Tokens that a static cache has room for."""
        longest = max(
            sum(part if isinstance(part, int) else part.size for part in parts)
            for parts in self.request.rows
        )
        later = sum(
            sum(part if isinstance(part, int) else 6 for part in getattr(turn, "said", ()))
            + getattr(turn, "new", 0)
            + getattr(turn, "steps", 0)
            for turn in self.request.turns
        )
        return longest + later + self.kind.virtual + self.request.room

    # what a call is handed

    def _columns(self, first: int, last: int) -> Tensor:
        return torch.tensor([self._line(row.ids, row.pad, 0)[first:last] for row in self.rows])

    def _line(self, values: list[int], pad: int, nothing: int) -> list[int]:
        line = [nothing] * pad + values
        return line + [nothing] * (self.width - len(line))

    def _mask(self) -> Tensor:
        return torch.tensor([self._line([1] * len(row.ids), row.pad, 0) for row in self.rows])

    @property
    def _is_padded(self) -> bool:
        return any(len(row.ids) < self.width for row in self.rows)

    def _images(self, first: int, whole: bool) -> dict[str, Any]:
        """The images of each row from number ``first`` on, as the model takes them."""
        given: dict[str, Any] = {}
        pixels = [image for row in self.rows for image in row.pixels[first:]]
        frames = [video for row in self.rows for video in row.frames[first:]]
        if not self.rows[0].is_grid:
            return {"pixel_values": torch.stack(pixels)} if pixels else {}
        start = 0 if whole else first
        if pixels:
            given["pixel_values"] = torch.cat(pixels)
            grids = [grid for row in self.rows for grid in row.grids[start:]]
            given["image_grid_thw"] = torch.tensor(grids)
        if frames:
            given["pixel_values_videos"] = torch.cat(frames)
            grids = [grid for row in self.rows for grid in row.videos[start:]]
            given["video_grid_thw"] = torch.tensor(grids)
        if given:
            kinds = [self._line(row.kinds, row.pad, 0) for row in self.rows]
            given["mm_token_type_ids"] = torch.tensor(kinds)
        return given

    def _given(self, ids: Tensor, embeds: bool) -> dict[str, Any]:
        if embeds:
            return {"inputs_embeds": self.model.get_input_embeddings()(ids).detach()}
        return {"input_ids": ids}

    # turns

    def _generate(self, turn: Generate) -> list[Found]:
        whole = turn.whole or not self.cached
        given = self._given(self._columns(0 if whole else self.cached, self.width), turn.embeds)
        if turn.masked or self._is_padded or not whole:
            given["attention_mask"] = self._mask()
        given |= self._images(0 if self.shows_again else self.shown, whole=True)
        if self.cache is not None:
            given[CACHE] = self.cache
        given |= {"use_cache": self.request.cache != "none"}
        given |= self._decoding(turn)
        out = self.model.generate(
            **given,
            max_new_tokens=turn.new,
            min_new_tokens=turn.new,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        scores = torch.stack(out.logits, dim=1)  # (rows, tokens, vocabulary)
        if getattr(out, "beam_indices", None) is not None:
            steps = torch.arange(turn.new)
            scores = torch.stack([scores[own[: turn.new], steps] for own in out.beam_indices])
        found, times = [], len(out.sequences) // len(self.rows)
        for number, (new, own) in enumerate(
            zip(out.sequences[:, -turn.new :].tolist(), scores, strict=True)
        ):
            row = copy.deepcopy(self.rows[number // times])
            start = len(row.ids) - 1
            for token in new:
                row.append(token)
            found.append(Found(row, number // times, start, own))
        if times == 1:
            self.rows = [own.row for own in found]
            self.cache = out[CACHE] if self.request.cache != "none" else None
        return found

    def _decoding(self, turn: Generate) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "greedy": {},
            "beams": {"num_beams": 3},
            "two of four beams": {"num_beams": 4, "num_return_sequences": 2},
            "three samples": {"do_sample": True, "num_return_sequences": 3},
            "lookup": {"prompt_lookup_num_tokens": 3},
            "long lookup": {"prompt_lookup_num_tokens": 12, "max_matching_ngram_size": 1},
            "assistant": {"assistant_model": self.drafting},
            "guidance": {"guidance_scale": 1.5},
        }[turn.decoding]
        settings = {"do_sample": False, **settings}
        if turn.chunk is not None:
            settings["prefill_chunk_size"] = turn.chunk
        if self.kind.images:
            settings["suppress_tokens"] = SPECIAL
        if self.judge is not None:
            settings["logits_processor"] = [self.judge]
        return settings

    def _forward(self, turn: Forward) -> list[Found]:
        given = self._given(self._columns(self.cached, self.width), turn.embeds)
        if turn.masked or self._is_padded:
            given["attention_mask"] = self._mask()
        given |= self._places(turn.positions, self.cached, self.width)
        given |= self._images(self.shown, whole=False)
        return self._call(given, self.cached, turn.as_tuple)

    def _loop(self, turn: Loop) -> list[Found]:
        found: list[list[Found]] = []
        chunk = turn.chunk or self.width
        with planned(self.width + turn.steps + turn.more + self.kind.virtual):
            for first in range(0, self.width, chunk):
                last = min(first + chunk, self.width)
                found.append(self._piece(turn, first, last))
            for row in self.rows:
                row.count_on()
            for _ in range(turn.steps):
                for row, own in zip(self.rows, found[-1], strict=True):
                    row.append(int(own.scores[-1].argmax()))
                found.append(self._piece(turn, self.width - 1, self.width))
        return [own for pieces in found for own in pieces]

    def _piece(self, turn: Loop, first: int, last: int) -> list[Found]:
        given = self._given(self._columns(first, last), embeds=False)
        if self._is_padded:
            given["attention_mask"] = self._mask()[:, :last]
        given |= self._places(turn.positions, first, last)
        given |= self._images(0, whole=False) if first == 0 else {}
        return self._call(given, first)

    def _places(self, positions: str, first: int, last: int) -> dict[str, Any]:
        if positions == "none" or any(row.is_placed for row in self.rows):
            return {}
        places = [[place[0] for place in row.places] for row in self.rows]
        lines = [
            self._line(own, row.pad, 0)[first:last]
            for own, row in zip(places, self.rows, strict=True)
        ]
        return {"position_ids": torch.tensor(lines)}

    def _call(self, given: dict[str, Any], first: int, as_tuple: bool = False) -> list[Found]:
        """Run a forward on the columns from ``first`` on."""
        keeps = self.request.cache != "none"
        if self.cache is not None:
            given[CACHE] = self.cache
        if self.kind.head == "tokens":
            given["use_cache"] = keeps
        if as_tuple:
            given["return_dict"] = False
        with torch.no_grad():
            out = self.model(**given)
        scores = out[0] if as_tuple else out.logits
        if keeps and self.kind.head == "tokens":
            parts = out if as_tuple else [out[CACHE]]
            self.cache = next(part for part in parts if hasattr(part, "get_seq_length"))
        if self.kind.head == "pooled":
            return [
                Found(row, number, 0, own)
                for number, (row, own) in enumerate(zip(self.rows, scores, strict=True))
            ]
        scores = scores[:, -next(iter(given.values())).shape[1] :]  # without learned tokens
        found = []
        for number, (row, own) in enumerate(zip(self.rows, scores, strict=True)):
            start = max(first - row.pad, 0)
            skipped = max(row.pad - first, 0)
            own = own[skipped : skipped + len(row.ids) - start]
            found.append(Found(copy.deepcopy(row), number, start, own))
        return found

    def _change(self, turn: Crop | Rows | Reset) -> None:
        if isinstance(turn, Reset):
            self.cache.reset()
            self.rows = [Written(row.seed + 50, row.model) for row in self.rows]
            self.cached = self.shown = 0
            return
        if isinstance(turn, Crop):
            self.cache.crop(-turn.tokens)
            self.cached -= turn.tokens
        for row in self.rows:  # what is not in the cache is forgotten
            row.cut(self.cached - row.pad)
        if isinstance(turn, Rows):
            order = order_of(turn, len(self.rows))
            self.rows = [copy.deepcopy(self.rows[number]) for number in order]
            change: Any = torch.tensor(order)
            getattr(self.cache, turn.how)(2 if turn.how.endswith("interleave") else change)


def order_of(turn: Rows, rows: int) -> list[int]:
    """Which rows the cache has afterwards."""
    backwards = list(range(rows))[::-1]
    return {
        "reorder_cache": backwards,
        "batch_select_indices": backwards[:2],
        "batch_repeat_interleave": [number for number in range(rows) for _ in range(2)],
    }[turn.how]


@dataclass
class Reckoning:
    """For which length each row has to be planned, turn by turn.

    Args:
        lengths: Length of each row; None while the cache is empty.
        may_exceed: Whether a plan may be longer by a step of growth.
        is_exact: Whether what is cached was computed under these lengths.
        is_kept: Whether nothing but this turn's own calls filled the cache: then rows within the
            trained length keep their bits.
        refuses: Why the turn may be refused; None if it must be served.
        has_content: Whether the cache holds what ids cannot give back.
        fills_again: Whether the cache has to be filled again from the whole text.
        was_beyond: Rows that were ever planned beyond the trained length.
    """

    lengths: list[int] | None = None
    may_exceed: bool = False
    is_exact: bool = True
    is_kept: bool = True
    refuses: str | None = None
    has_content: bool = False
    fills_again: bool = False
    was_beyond: list[bool] = field(default_factory=list)

    def before(self, session: Session, turn: Turn) -> None:
        """Reckon a turn, after its text has been written."""
        self.refuses, self.may_exceed, self.fills_again = None, False, False
        if isinstance(turn, Reset):
            self.__init__()  # type: ignore[misc]
            return
        if isinstance(turn, Rows):
            order = order_of(turn, len(session.rows))
            assert self.lengths is not None
            self.lengths = [self.lengths[number] for number in order]
            self.was_beyond = [self.was_beyond[number] for number in order]
            return
        if isinstance(turn, Crop):
            return
        to_come = {Generate: "new", Loop: "steps"}.get(type(turn))
        ahead = getattr(turn, to_come) if to_come else 0
        ahead += getattr(turn, "more", 0) + session.kind.virtual
        # behind a video, `generate` goes on from the last token, and a loop from the last frame
        ends = [row.longest if isinstance(turn, Loop) else row.next for row in session.rows]
        final = [max(row.longest, end + ahead) for row, end in zip(session.rows, ends, strict=True)]
        request, chunk = session.request, getattr(turn, "chunk", None)
        if chunk is not None and any(row.pad >= chunk for row in session.rows):
            self.refuses = "the first chunk of a row is padding"
        if chunk is not None and session.kind.virtual:
            self.refuses = "PEFT puts its tokens before every chunk"
        if not session.cached:
            if isinstance(turn, Forward) and request.cache == "static":  # planned for its size
                room = session.size - session.width
                final = [max(own + room, session.size) for own in final]
            self.lengths = final
        elif not self._covers(final):
            self._outgrow(session, turn, final)
        elif getattr(turn, "positions", None) == "leap":
            # the tokens that the plan has room for would go beyond it, so it may grow already
            self.refuses = "positions leap"
            self.may_exceed, self.is_exact = True, self.is_exact and session.kind.layers == 1
        self.has_content |= any(row.pixels or row.frames or row.by_hand for row in session.rows)
        self.has_content |= getattr(turn, "embeds", False)
        assert self.lengths is not None
        beyond = [length > TRAINED for length in self.lengths]
        known = self.was_beyond or [False] * len(beyond)
        self.was_beyond = [one or other for one, other in zip(beyond, known, strict=True)]

    def _covers(self, final: list[int]) -> bool:
        assert self.lengths is not None
        return all(
            own <= max(length, TRAINED) for own, length in zip(final, self.lengths, strict=True)
        )

    def _outgrow(self, session: Session, turn: Turn, final: list[int]) -> None:
        assert self.lengths is not None
        request = session.request
        again = getattr(turn, "again", False)
        if isinstance(turn, Generate) and turn.whole and (not self.has_content or again):
            self.lengths, self.is_exact, self.is_kept = final, True, False
            self.fills_again = True
            return
        if request.cache == "static":
            self.refuses = "a cache of fixed size does not grow"
            return  # or goes on under the plan it has
        if request.on_growth == "error":
            self.refuses = "on_growth='error'"
        if request.on_growth != "freeze":
            self.lengths = [max(pair) for pair in zip(final, self.lengths, strict=True)]
            self.may_exceed = isinstance(turn, Forward)
            self.is_exact &= session.kind.layers == 1

    def agrees(self, reported: list[float]) -> bool:
        """Return whether these are the lengths of the plan; within the trained one all are one."""
        assert self.lengths is not None
        for found, own in zip(reported, self.lengths, strict=True):
            most = max(own, TRAINED)
            if self.may_exceed:
                most = (most + LEAP) * MOST_GROWTH + 1
            if not max(own, TRAINED) <= max(found, TRAINED) <= most:
                return False
        return True


def twin_arguments(row: Written, tokens: int) -> dict[str, Any]:
    """Arguments of a forward on the first tokens of one row alone."""
    ids = torch.tensor([row.ids[:tokens]])
    given: dict[str, Any] = {"input_ids": ids}
    if row.pixels:
        pixels = torch.cat(row.pixels) if row.is_grid else torch.stack(row.pixels)
        given["pixel_values"] = pixels
    if row.frames:
        given["pixel_values_videos"] = torch.cat(row.frames)
        given["video_grid_thw"] = torch.tensor(row.videos)
    if row.grids:
        given["image_grid_thw"] = torch.tensor(row.grids)
    if row.is_placed:
        given["mm_token_type_ids"] = torch.tensor([row.kinds[:tokens]])
    if row.by_hand:
        places = torch.tensor(row.places[:tokens]).T[:, None]
        given["position_ids"] = places if row.is_grid else places[0]
    return given
