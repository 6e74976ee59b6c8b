"""What must hold for every request, and how requests are drawn."""

import asyncio
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from drawn_models import KINDS, TRAINED, Patched, forget, patched, stock, twin
from drawn_requests import (
    Crop,
    Found,
    Reckoning,
    Request,
    Reset,
    Rows,
    Session,
    Written,
    twin_arguments,
)
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

from hf_rope_ext import RopeError, planned, request_plan

EXACT = 3e-5
"""Largest difference of logits that rounding makes, as a share of the largest logit."""
SEEN = 30 * EXACT
"""A plan for another length is told from the right one by more than this."""
DRAFTS = "llama of one layer"
REJECTED: Counter[str] = Counter()
"""What stock transformers said of requests that it does not serve."""


def check(request: Request) -> None:
    """Run a request; every row must be as it is alone in a forward planned for its final length.

    Raises:
        UnsatisfiedAssumption: If stock transformers does not serve it either.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(request)
    except UnsatisfiedAssumption:
        raise
    except BaseException:
        forget()  # what a failure leaves behind must not make the next
        raise


def _check(request: Request) -> None:
    own = patched(request.kind, request.method, request.on_growth)
    own.plans.clear()
    judge = _judge() if request.beside == "another model in generate" else None
    session = Session(own.model, request, _drafting(request), judge)
    plain = Session(stock(request.kind), request, stock(DRAFTS))
    for part in plain.model.modules():
        if getattr(part, "rope_deltas", None) is not None:
            part.rope_deltas = None
    reckoning = Reckoning()
    for number, turn in enumerate(request.turns):
        if not isinstance(turn, Crop | Rows | Reset):
            session.say(turn)
            plain.say(turn)
        reckoning.before(session, turn)
        session.shows_again = reckoning.fills_again and getattr(turn, "again", False)
        try:
            torch.manual_seed(number)
            unscaled = _of_tokens(plain.do(turn))
        except Exception as error:
            REJECTED[f"{type(error).__name__}: {error}"[:300]] += 1
            reject()
        before = _snapshot(session.cache)
        torch.manual_seed(number)
        try:
            found = _of_tokens(beside(request, functools.partial(session.do, turn)))
            _require_planned(own, session, reckoning, f"turn {number}")
            _compare(request, reckoning, found, unscaled, f"turn {number}")
        except RopeError as error:
            if reckoning.refuses is None:
                raise AssertionError(f"turn {number} is valid, but refused: {error}") from error
            _require_unchanged(before, session.cache)
            _require_usable(own, request.kind)
            return
        except Exception:
            # on some releases PEFT adds its tokens in every step on a cache, which a patch mends
            mended = KINDS[request.kind].virtual and request.cache != "none"
            if not mended and not _is_right(request, unscaled):
                REJECTED["stock does not agree with itself"] += 1
                reject()
            raise


def _of_tokens(found: Sequence[Found]) -> list[Found]:
    """Leave out what holds nothing but padding."""
    return [one for one in found if one.scores.numel()]


def _drafting(request: Request) -> Any:
    drafts = any(getattr(turn, "decoding", "") == "assistant" for turn in request.turns)
    return patched(DRAFTS, request.method).model if drafts else None


def _is_right(request: Request, unscaled: Sequence[Found]) -> bool:
    """Return whether stock gives each row what it gives it alone, without a cache."""
    own = twin(request.kind)
    return all(
        _relative(one.scores, alone(own, request.method, 1, one)) < EXACT for one in unscaled
    )


def _compare(
    request: Request,
    reckoning: Reckoning,
    found: Sequence[Found],
    unscaled: Sequence[Found],
    where: str,
) -> None:
    own = twin(request.kind)
    for one, other in zip(found, unscaled, strict=True):
        assert reckoning.lengths is not None
        length = reckoning.lengths[one.source]
        if reckoning.is_kept and not reckoning.was_beyond[one.source]:
            apart = _relative(one.scores, other.scores)
            same = torch.equal(one.scores, other.scores)
            assert same or (own.kind.virtual and not _is_right(request, unscaled)), (
                f"{where}, row {one.source}: within the trained length, but the scores differ from "
                f"those of the unpatched model by {apart:.1e}"
            )
        if not reckoning.is_exact:
            continue
        right = alone(own, request.method, length, one)
        gap = _relative(one.scores, right)
        assert gap < EXACT, (
            f"{where}, row {one.source}: {gap:.1e} off the row alone in a forward planned for "
            f"{length}"
        )


def alone(own: Any, method: str, length: int, found: Found) -> Tensor:
    """The same scores from the row alone, without a cache, planned for this length."""
    is_pooled = own.kind.head == "pooled"
    tokens = len(found.row.ids) if is_pooled else found.start + len(found.scores)
    model = own.set_length(method, length)
    with torch.no_grad():
        if own.kind.counts_columns:
            scores = _behind_prompt(model, found.row, tokens).logits[0]
        else:
            scores = model(**twin_arguments(found.row, tokens)).logits[0]
    return scores if is_pooled else scores[-len(found.scores) :]


def _behind_prompt(model: Any, row: Written, tokens: int) -> Any:
    """Run the base model on learned embeddings and a row, at the positions that the row is at."""
    learned = model.get_prompt(batch_size=1)
    words = model.word_embeddings(torch.tensor([row.ids[:tokens]]))
    virtual = learned.shape[1]
    places = [*range(virtual), *(virtual + place for place, *_ in row.places[:tokens])]
    embeds = torch.cat((learned, words), dim=1)
    return model.base_model(inputs_embeds=embeds, position_ids=torch.tensor([places]))


def _require_planned(own: Patched, session: Session, reckoning: Reckoning, where: str) -> None:
    """Check what the patch tells of its plan, where a turn made one or continued one."""
    if session.cache is not None:
        plan = request_plan(session.cache)
    else:
        plan = own.plans[-1] if own.plans else None
    if plan is None or reckoning.lengths is None:
        return
    told = plan.lengths.tolist()
    rows = len(reckoning.lengths)
    if rows and len(told) % rows == 0:  # beams repeat rows
        told = told[:: len(told) // rows]
    told = told * rows if len(told) == 1 else told
    assert reckoning.agrees(told), f"{where}: planned for {told}, not {reckoning.lengths}"
    if reckoning.may_exceed:
        reckoning.lengths = [round(own) for own in told]


def _snapshot(cache: Any) -> list[Tensor]:
    held = [] if cache is None else [(own.keys, own.values) for own in cache.layers]
    return [part.clone() for pair in held for part in pair if isinstance(part, Tensor)]


def _require_unchanged(before: list[Tensor], cache: Any) -> None:
    after = _snapshot(cache)
    assert len(before) == len(after)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), (
        "refused, but the cache has changed"
    )


def _require_usable(own: Patched, kind: str) -> None:
    ids = torch.arange(10, 14)[None]  # with learned tokens, too, it is within the trained length
    with torch.no_grad():
        assert torch.equal(own.model(input_ids=ids)[0], stock(kind)(input_ids=ids)[0]), (
            "refused, but the model does not work as before"
        )


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


# what goes on beside a request

BESIDE = (
    "nothing",
    "a block of another task",
    "a block of another thread",
    "blocks that overlapped",
    "another model in generate",
    "the generate of another model",
)


def beside(request: Request, action: Callable[[], Any]) -> Any:
    """Do something while something else goes on."""
    kinds: dict[str, Callable[[Callable[[], Any]], Any]] = {
        "a block of another task": _beside_task,
        "a block of another thread": _beside_thread,
        "blocks that overlapped": _after_overlap,
        "the generate of another model": functools.partial(_within_generate, request),
    }
    return kinds[request.beside](action) if request.beside in kinds else action()


def _beside_task(action: Callable[[], Any]) -> Any:
    async def serve() -> Any:
        entered, done = asyncio.Event(), asyncio.Event()

        async def neighbour() -> None:
            with planned(150):
                entered.set()
                await done.wait()

        task = asyncio.create_task(neighbour())
        await entered.wait()
        try:
            return action()
        finally:
            done.set()
            await task

    return asyncio.run(serve())


def _beside_thread(action: Callable[[], Any]) -> Any:
    entered, done = threading.Event(), threading.Event()

    def neighbour() -> None:
        with planned(150):
            entered.set()
            done.wait()

    thread = threading.Thread(target=neighbour)
    thread.start()
    entered.wait()
    try:
        return action()
    finally:
        done.set()
        thread.join()


def _after_overlap(action: Callable[[], Any]) -> Any:
    first, second = planned(150), planned(140)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    return action()


def _within_generate(request: Request, action: Callable[[], Any]) -> Any:
    results = []

    def once(tokens: Tensor, scores: Tensor) -> Tensor:
        if not results:
            results.append(action())
        return scores

    model = patched("llama", "dynamic_linear").model  # none of the request's own
    ids = torch.arange(10, 15)[None]
    model.generate(ids, max_new_tokens=90, logits_processor=[once], stopping_criteria=[_at_once])
    return results[0]


def _at_once(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.ones(len(ids), dtype=torch.bool)


def _judge() -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that runs another patched model, within its trained length."""
    other, plain = patched(DRAFTS, "dynamic_linear").model, stock(DRAFTS)
    ids = torch.arange(10, 10 + TRAINED)[None]

    def judge(tokens: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            assert torch.equal(other(ids).logits, plain(ids).logits), "the other model is scaled"
        return scores

    return judge


# how many are drawn


def drawn(
    strategy: st.SearchStrategy[Any], *, fast: int, slow: int, examples: Sequence[Any] = ()
) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Make a test of a property: in the fast tier on the examples and a few draws, else on many."""
    counts = [fast, pytest.param(slow, marks=pytest.mark.slow)]

    def decorate(holds: Callable[[Any], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("count", counts, ids=["few", "many"])
        def test(count: int) -> None:
            @settings(
                max_examples=count,
                derandomize=True,
                deadline=None,
                database=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def of(request: Any) -> None:
                holds(request)

            for one in examples:
                of = example(one)(of)
            of()

        test.__name__ = holds.__name__
        return test

    return decorate
