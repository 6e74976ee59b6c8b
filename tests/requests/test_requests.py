"""Whole requests, drawn: each row gets what it would get alone, in a forward without a cache.

Within the trained length it gets the unpatched model's bits; whatever is refused is refused before
anything changes. `drawn_requests` says what a request is, `checked_requests` what must hold.
"""

import pytest
from checked_requests import BESIDE, EXACT, SEEN, alone, check, drawn
from drawn_models import (
    BY_AXIS,
    IMAGES,
    KINDS,
    LEARNED,
    METHODS,
    TEXT,
    TRAINED,
    twin,
)
from drawn_requests import (
    Crop,
    Forward,
    Found,
    Generate,
    Image,
    Loop,
    Request,
    Reset,
    Rows,
    Video,
    Written,
)
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GRID = tuple(name for name in IMAGES if KINDS[name].images == "grid")
FULL = ("llama", "llama of one layer", "gptj")  # no layer has a window

lengths = st.integers(TRAINED - 6, TRAINED + 4) | st.integers(1, 48)
few = st.integers(1, 12)
methods = st.sampled_from(METHODS)
caches = st.sampled_from(("its own", "dynamic", "static"))


@st.composite
def texts(draw, most=4, padded=True):
    """Rows of words alone; of one length where nothing may be padded."""
    count = draw(st.integers(1, most))
    if not padded or draw(st.booleans()):
        return ((draw(lengths),),) * count
    return tuple((draw(lengths),) for _ in range(count))


@st.composite
def pictured(draw, kind, most=3):
    """Rows with as many images each, or videos, at any place in them."""
    image = st.builds(Image, st.integers(1, 5), st.integers(1, 5))
    video = st.builds(Video, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
    shown = [image] * draw(st.integers(1, 2))
    if KINDS[kind].video and draw(st.booleans()):
        shown = [video] if KINDS[kind].same_token else draw(st.permutations([video, *shown[1:]]))
    rows = []
    for _ in range(draw(st.integers(1, most))):
        parts = [draw(few)]
        for one in shown:
            parts += [draw(one), draw(few)]
        rows.append(tuple(parts))
    return tuple(rows)


@st.composite
def forwards(draw):
    kind = draw(st.sampled_from((*TEXT, "classifier")))
    cache = draw(st.sampled_from(("none", "its own", "dynamic", "static")))
    turn = Forward(
        positions=draw(st.sampled_from(("none", "mask"))),
        embeds=draw(st.booleans()) and kind != "classifier",
        as_tuple=draw(st.booleans()),
        masked=draw(st.booleans()),
    )
    return Request(
        kind,
        draw(texts()),
        (turn,),
        method=draw(methods),
        side=draw(st.sampled_from(("left", "right"))),
        cache="none" if kind == "classifier" else cache,
        room=draw(st.integers(0, 20)),
        beside=draw(st.sampled_from(BESIDE)),
    )


@drawn(
    forwards(),
    fast=25,
    slow=500,
    examples=[
        # padding counted as length
        Request("llama", ((60,), (6,)), (Forward(positions="none"),), side="right", cache="none"),
        Request("llama", ((60,), (6,)), (Forward(),), cache="its own"),
        Request("classifier", ((60,), (6,)), (Forward(positions="none"),), side="right"),
        # a block that belongs to another task, or to nobody any more
        Request("llama", ((6,),), (Forward(),), beside="a block of another task"),
        Request("llama", ((6,),), (Forward(),), beside="blocks that overlapped"),
        Request("llama", ((6,),), (Forward(),), beside="the generate of another model"),
    ],
)
def test_a_forward_is_planned_by_what_each_row_holds(request):
    check(request)


@st.composite
def loops(draw):
    kind = draw(st.sampled_from(TEXT))
    chunk = draw(st.none() | st.integers(4, 20))
    turn = Loop(
        chunk=chunk,
        steps=draw(st.integers(0, 5)),
        more=draw(st.integers(0, 20)),
        positions=draw(st.sampled_from(("none", "mask"))),
    )
    rows = draw(texts())
    side = draw(st.sampled_from(("left", "right"))) if chunk is None and not turn.steps else "left"
    return Request(
        kind,
        rows,
        (turn,),
        method=draw(methods),
        side=side,
        cache=draw(caches),
        room=draw(st.integers(0, 20)),
        beside=draw(st.sampled_from(BESIDE)),
    )


@drawn(loops(), fast=15, slow=300)
def test_a_loop_in_a_block_is_planned_for_the_length_it_names(request):
    check(request)


SEVERAL = ("greedy", "beams", "two of four beams", "three samples")
ONE_ROW = ("lookup", "long lookup", "assistant")


@st.composite
def generations(draw, kinds=TEXT, rows=None):
    kind = draw(st.sampled_from(kinds))
    given = draw(texts() if rows is None else rows)
    cache = draw(st.sampled_from(("none", "its own", "dynamic", "static")))
    learns, grows = bool(KINDS[kind].virtual), cache in ("its own", "dynamic")
    chunk = draw(st.none() | st.integers(4, 20))
    chunk = None if cache == "none" or learns else chunk
    embeds = draw(st.booleans()) and chunk is None and not learns
    decodings = SEVERAL
    if not learns and not embeds:
        decodings += ("guidance", *(ONE_ROW if len(given) == 1 and grows else ()))
    turn = Generate(
        new=draw(st.integers(1, 8)),
        decoding=draw(st.just("greedy") | st.sampled_from(decodings)),
        chunk=chunk,
        embeds=embeds,
        masked=draw(st.booleans()),
    )
    return Request(
        kind,
        given,
        (turn,),
        method=draw(methods),
        cache=cache,
        room=draw(st.integers(0, 20)),
        on_growth=draw(st.sampled_from(("rerotate", "error", "freeze"))),
        beside=draw(st.sampled_from(BESIDE)),
    )


@drawn(
    generations(),
    fast=25,
    slow=500,
    examples=[
        # more tokens in a step than the request will have
        Request("llama", ((40,),), (Generate(8, decoding="lookup"),), on_growth="error"),
        Request("llama", ((14,),), (Generate(8, decoding="long lookup"),)),
        Request("llama", ((40,),), (Generate(8),), beside="another model in generate"),
    ],
)
def test_generate_is_planned_for_its_last_token(request):
    check(request)


@drawn(
    generations(kinds=LEARNED),
    fast=8,
    slow=150,
    examples=[
        *(Request(kind, ((14,),), (Generate(4),)) for kind in LEARNED),
        # PEFT puts the padding of a row between its learned embeddings and its text
        *(Request(kind, ((12,), (4,)), (Generate(3, decoding="beams"),)) for kind in LEARNED),
    ],
)
def test_learned_tokens_count_as_length(request):
    check(request)


@st.composite
def changes(draw, request_rows, cache):
    """What is done to a cache between two turns."""
    steps = []
    if draw(st.booleans()):
        steps.append(Crop(draw(st.integers(1, 3))))
    if draw(st.booleans()) and cache != "static":
        hows = ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"]
        steps.append(Rows(draw(st.sampled_from(hows))))
    if draw(st.integers(0, 5)) == 0:
        steps = [Reset()]
    return steps


@st.composite
def speaking(draw, by_generate):
    said = (draw(few | st.integers(2, 30)),)
    if by_generate:
        return Generate(
            draw(st.integers(1, 5)),
            said,
            whole=draw(st.booleans()),
            chunk=draw(st.none() | st.integers(4, 20)),
        )
    # a single token is taken to follow its cache, since looking at it would wait for the device
    positions = "mask" if said == (1,) else draw(st.sampled_from(("mask", "mask", "leap")))
    return Forward(said, positions, as_tuple=draw(st.booleans()))


@st.composite
def chats(draw):
    kind = draw(st.sampled_from(("llama of one layer", *TEXT)))
    cache = draw(caches)
    if draw(st.booleans()):
        first = Generate(draw(st.integers(1, 5)), chunk=draw(st.none() | st.integers(4, 20)))
    elif draw(st.booleans()):
        first = Loop(chunk=draw(st.none() | st.integers(4, 20)), more=draw(st.integers(0, 40)))
    else:
        first = Forward(embeds=draw(st.booleans()), as_tuple=draw(st.booleans()))
    turns = [first]
    rows = draw(texts(most=3))
    for _ in range(draw(st.integers(1, 3))):
        if kind in FULL:
            turns += draw(changes(rows, cache))
        turns.append(draw(speaking(draw(st.booleans()))))
    return Request(
        kind,
        rows,
        tuple(turns),
        method=draw(methods),
        cache=cache,
        room=draw(st.integers(0, 20)),
        on_growth=draw(st.sampled_from(("rerotate", "error", "freeze"))),
        beside=draw(st.just("nothing") | st.sampled_from(BESIDE)),
    )


@drawn(
    chats(),
    fast=25,
    slow=600,
    examples=[
        # a plan whose rows stay where the rows of the cache do not
        Request(
            "llama",
            ((60,), (6,)),
            (Loop(steps=0, more=3), Rows("reorder_cache"), Forward((1,))),
        ),
        # a cache of fixed size, used again
        Request(
            "llama",
            ((6,),),
            (Generate(3), Reset(), Forward((40,))),
            cache="static",
        ),
        # positions that leap
        Request("llama of one layer", ((10,),), (Forward(), Forward((2,), "leap"), Forward((12,)))),
        # growth within the trained length, where all plans agree
        Request("llama", ((10,),), (Generate(1), Forward((1,))), on_growth="error"),
        # a prefix of a longer block goes on under its plan
        Request("llama", ((6,),), (Loop(more=140), Generate(4, (4,)))),
    ],
)
def test_every_turn_of_a_chat_is_planned(request):
    check(request)


@st.composite
def talks_on_images(draw):
    kind = draw(st.sampled_from(IMAGES))
    cache = draw(caches)
    shape = draw(st.sampled_from(("forward", "loop", "generate", "chat")))
    rows = draw(pictured(kind))
    is_film = any(isinstance(part, Video) for part in rows[0])
    if shape == "forward":
        turns = [Forward(as_tuple=draw(st.booleans()))]
    elif shape == "loop":
        rows = rows[:1]
        turns = [Loop(steps=draw(st.integers(0, 4)), more=draw(st.integers(0, 20)))]
    else:
        chunk = draw(st.none() | st.integers(4, 20))
        decoding = draw(st.sampled_from(("greedy", "greedy", "beams", "three samples")))
        if shape == "chat":
            decoding = "greedy"
        if decoding != "greedy":  # stock loses images of chunks where it repeats rows
            chunk = None
        turns = [Generate(draw(st.integers(1, 6)), decoding=decoding, chunk=chunk)]
    if shape == "chat":
        for _ in range(draw(st.integers(1, 2))):
            image = (draw(st.builds(Image, st.integers(1, 4), st.integers(1, 4))),)
            # stock places new images along a grid in a first turn alone
            shows = draw(st.booleans()) and kind not in GRID
            said = (draw(few), *(image if shows else ()), draw(few))
            again, whole = draw(st.booleans()) and not shows, shows or draw(st.booleans())
            if not shows and draw(st.booleans()):
                rows = rows[:1]  # stock counts masked columns of the whole text
                turns.append(Forward(said, masked=False, as_tuple=draw(st.booleans())))
                continue
            # a text that is counted anew has other positions behind a video than a cache of it
            again &= not is_film
            turns.append(Generate(draw(st.integers(1, 4)), said, whole=whole, again=again))
    methods_here = (*METHODS, BY_AXIS) if kind in GRID else METHODS
    return Request(
        kind,
        rows,
        tuple(turns),
        method=draw(st.sampled_from(methods_here)),
        cache=cache,
        room=draw(st.integers(0, 20)),
        on_growth=draw(st.sampled_from(("rerotate", "error", "freeze"))),
        beside=draw(st.just("nothing") | st.sampled_from(BESIDE)),
    )


@drawn(
    talks_on_images(),
    fast=25,
    slow=600,
    examples=[
        # an image that ids cannot give back, in a model whose keys can be rotated exactly
        Request("llava", ((4, Image(), 2),), (Generate(1), Generate(3, (20,)))),
        Request("llava", ((4, Image(), 2),), (Generate(1), Generate(3, (20,), again=True))),
        # positions are fewer than tokens, in chunks and in later turns
        Request("qwen2_5_vl", ((4, Image(4, 6), 4),), (Generate(4, chunk=8),)),
        Request("qwen2_5_vl", ((4, Image(4, 6), 4),), (Generate(4), Generate(4, (6,)))),
        # a video near the end, whose last frame is further on than the text behind it
        Request("qwen2_5_vl", ((4, Video(4, 1, 1), 1),), (Loop(steps=3, more=2),)),
        Request("qwen2_5_vl", ((4, Video(4), 1),), (Generate(3), Forward((4,), masked=False))),
        # what the model notes of a prompt that returns a tuple
        Request(
            "qwen2_5_vl",
            ((4, Image(2, 4), 4),),
            (Forward(as_tuple=True, masked=False), Forward((2,), masked=False)),
        ),
    ],
)
def test_images_take_the_positions_that_they_take(request):
    check(request)


@pytest.mark.parametrize("method", [*METHODS, BY_AXIS])
@pytest.mark.parametrize("kind", [name for name in KINDS if KINDS[name].head != "none"])
def test_a_plan_for_one_position_more_is_seen(kind, method):
    if method == BY_AXIS and kind not in GRID:
        pytest.skip("it has one axis")
    own, row = twin(kind), Written(0, KINDS[kind])
    row.add((40,))
    for length in (TRAINED + 1, 30, 44):
        found = Found(
            row, 0, 0, row_scores := alone(own, method, length, Found(row, 0, 0, [0] * 40))
        )
        other = alone(own, method, length - 1, found)
        gap = float((row_scores - other).abs().max() / row_scores.abs().max())
        if method == "longrope" and length > TRAINED + 1:
            assert gap == 0  # one list for all of them
        else:
            assert gap > SEEN > EXACT
