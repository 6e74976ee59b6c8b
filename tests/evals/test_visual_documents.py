"""The visual needle: what is drawn, how it fits, and models that cheat by design."""

import itertools
import json
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import vision
from torch import nn
from transformers import AutoProcessor, Qwen2_5_VLConfig

from hf_rope_ext import RopeError, patched
from hf_rope_ext.cli.app import app
from hf_rope_ext.evals.bench import Bench
from hf_rope_ext.evals.compare import Comparison, compare, evaluate
from hf_rope_ext.evals.measures import make_measures
from hf_rope_ext.evals.tasks.base import Place
from hf_rope_ext.evals.tasks.frames import COLORS, SEGMENTS, Card, Frame, draw_frame
from hf_rope_ext.evals.tasks.visual_needle import VisualNeedle
from hf_rope_ext.evals.visual_documents import FrameEncoder, VisualDocuments
from hf_rope_ext.methods import Linear, NoScaling

PIXELS = 48

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")


@pytest.fixture(scope="module")
def processor():
    return vision.processor()


@pytest.fixture(scope="module")
def model(processor):
    return vision.model(processor)


def nothing(done):
    pass


def visual(processor, length, spec="rope_vniah", samples=1, **options):
    words = [f"{name}={value}" for name, value in {"pixels": PIXELS, **options}.items()]
    bench = Bench(None, "", length, 64, samples=samples, seed=1, processor=processor)
    (measure,) = make_measures((":".join([spec, *words]),), bench).values()
    return measure


def scores(cell):
    return {part["depth"]: part["score"] for part in cell["parts"]}


class Watcher(nn.Module):
    """Answers from the pixels of the last frames it is shown, and from nothing else."""

    def __init__(self, model, processor, sees):
        super().__init__()
        self.model = model  # for its positions; it computes nothing
        self.processor = processor
        self.sees = sees
        self.weight = nn.Parameter(torch.zeros(1))

    def says(self, input_ids, pixel_values, image_grid_thw):
        told = self.processor.tokenizer.decode(input_ids[0])
        question = r"with a (\w+) digit\. .*?(digit|row|column)\b(?= is it| of)"
        color, asks = re.search(question, told).groups()
        shown = frames(pixel_values, image_grid_thw, self.processor)[-self.sees :]
        cards = [card for card in map(read, shown) if card and card.color == color]
        assert len(cards) <= 1
        if not cards:
            return self.processor.tokenizer(" ?")["input_ids"]
        names = {"row": ("top", "middle", "bottom"), "column": ("left", "center", "right")}
        found = getattr(cards[0], asks)
        return self.processor.tokenizer(f" {names[asks][found] if asks in names else found}")[
            "input_ids"
        ]

    def forward(self, input_ids, pixel_values, image_grid_thw, logits_to_keep=0, **others):
        says = self.says(input_ids, pixel_values, image_grid_thw)
        logits = torch.zeros(1, logits_to_keep, 300)
        for place, token in zip(range(logits_to_keep - 1), says, strict=False):
            logits[0, place, token] = 1
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, pixel_values, image_grid_thw, generation_config, **others):
        says = torch.tensor([self.says(input_ids, pixel_values, image_grid_thw)])
        assert says.shape[1] <= generation_config.max_new_tokens
        return torch.cat((input_ids, says), dim=1)


def frames(pixel_values, grids, processor):
    """The pictures that the model was given, put together again from its patches."""
    size, merge = vision.PATCH, vision.MERGE
    settings = processor.image_processor
    mean, std = (
        torch.tensor(one)[:, None, None] for one in (settings.image_mean, settings.image_std)
    )
    first = 0
    found = []
    for _, high, wide in grids.tolist():
        patches = pixel_values[first : first + high * wide]
        first += high * wide
        grid = patches.view(high // merge, wide // merge, merge, merge, 3, 2, size, size)
        assert torch.equal(grid[..., 0, :, :], grid[..., 1, :, :])
        picture = (
            grid[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, high * size, wide * size)
        )
        found.append(picture * std + mean)
    return found


def read(picture):
    """The card in a picture, by comparing it with every card there is; None if there is none."""
    third = picture.shape[1] // 3
    for row, column in itertools.product(range(3), range(3)):
        spot = picture[:, row * third : (row + 1) * third, column * third : (column + 1) * third]
        white = (spot > 0.97).all(dim=0)
        # a card's edge is white, and most of it
        if not (white[0].all() and white[:, 0].all() and white[-1].all() and white[:, -1].all()):
            continue
        ink = spot[:, ~white].mean(dim=1) * 255
        color = min(COLORS, key=lambda name: sum(abs(torch.tensor(COLORS[name]) - ink)))
        return Card(lit_digit(~white), color, row, column)
    return None


def lit_digit(ink):
    """The digit whose seven strokes are lit, each looked at in its middle."""
    side = len(ink)
    middles = [
        (0.16, 0.5),
        (0.33, 0.27),
        (0.33, 0.73),
        (0.5, 0.5),
        (0.67, 0.27),
        (0.67, 0.73),
        (0.84, 0.5),
    ]
    lit = "".join(str(int(ink[int(y * side), int(x * side)])) for y, x in middles)
    seven = {
        "1110111": 0, "0010010": 1, "1011101": 2, "1011011": 3, "0111010": 4,
        "1101011": 5, "1101111": 6, "1010010": 7, "1111111": 8, "1111011": 9,
    }  # fmt: skip
    return seven[lit]


def test_the_ten_digits_look_different():
    assert len(set(SEGMENTS)) == 10


@pytest.mark.parametrize("asks", ["digit", "row", "column"])
@pytest.mark.parametrize("name", ["rope_vniah", "rope_vniah_d"])
def test_a_model_that_sees_all_finds_all_and_one_that_forgets_what_it_still_sees(
    processor, model, name, asks
):
    length, sees = 1000, 12
    measure = visual(processor, length, name, asks=asks)
    everything = measure.run(Watcher(model, processor, 10**6), length, 1, nothing)
    recent = measure.run(Watcher(model, processor, sees), length, 1, nothing)

    assert set(scores(everything)) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert set(scores(everything).values()) == {1.0}
    assert (everything["score"], everything["token_accuracy"]) == (1.0, 1.0)
    expected = {
        depth: float(round(depth * (everything["frames"] - 1)) >= everything["frames"] - sees)
        for depth in scores(recent)
    }
    assert scores(recent) == expected
    assert 0 < sum(expected.values()) < 5


def test_a_random_model_is_at_chance(processor, model):
    measure = visual(processor, 400, asks="row", samples=4, depths="[0.5]")

    cell = measure.run(model, 400, 1, nothing)

    assert cell["score"] <= 0.25
    assert cell["nll"] > 1


def test_an_answer_can_be_generated(processor, model):
    measure = visual(processor, 600, "rope_vniah_d", generated="true", period=3)

    everything = measure.run(Watcher(model, processor, 10**6), 600, 1, nothing)
    recent = measure.run(Watcher(model, processor, 1), 600, 1, nothing)

    assert set(scores(everything).values()) == {1.0}
    assert scores(recent) == {0.0: 0.0, 0.25: 0.0, 0.5: 0.0, 0.75: 0.0, 1.0: 1.0}
    assert everything["frames"] >= 9
    visual(processor, 400, generated="true", depths="[0.5]").run(model, 400, 1, nothing)


@pytest.mark.parametrize("generated", [True, False])
def test_a_question_fits_its_length_and_one_frame_more_would_not(processor, generated):
    task = VisualNeedle(generated=generated, depths=(0.5,), pixels=PIXELS)
    documents = VisualDocuments("rope_vniah", task, processor, samples=1, seed=1)
    free = task.max_new_tokens if generated else 0

    # a frame of 48 pixels is 38 tokens, so one of these lengths is exactly full
    for length in range(360, 400):
        (place,) = documents.places(length)
        draft = documents.draft(place)
        more = documents.draft_at(place, len(draft.frames) + 1)
        used, over = (
            documents.encoder.inputs(one)["input_ids"].shape[1] + free for one in (draft, more)
        )
        assert used <= length < over


def test_the_card_is_there_once_at_its_depth_and_distractors_at_their_period(processor):
    task = VisualNeedle(period=4)
    for depth, size in itertools.product((0.0, 0.3, 1.0), (1, 7, 40)):
        draft = task.draft(random.Random(depth), size, Place(0, depth))
        cards = {number: frame.card for number, frame in enumerate(draft.frames) if frame.card}
        at = round(depth * (size - 1))
        assert set(cards) == {number for number in range(size) if (number - at) % 4 == 0}
        own = cards.pop(at)
        assert draft.gold == (str(own.digit),)
        assert own.color in draft.prompt
        for other in cards.values():
            assert other.color != own.color
            assert other.digit != own.digit
    plain = VisualNeedle().draft(random.Random(0), 40, Place(0, 0.5))
    assert sum(frame.card is not None for frame in plain.frames) == 1
    assert len({frame.scene for frame in plain.frames}) == 40


def test_what_is_drawn_depends_on_the_frame_alone():
    one = Frame("7/3", Card(4, "green", 1, 2))
    picture = draw_frame(one, 90)

    assert picture.tobytes() == draw_frame(one, 90).tobytes()
    assert picture.size == (90, 90)
    assert picture.tobytes() != draw_frame(Frame("7/4", one.card), 90).tobytes()
    # on white, in the middle row at the right, the green middle stroke of a four
    assert picture.getpixel((61, 31)) == (255, 255, 255)
    assert picture.getpixel((75, 45)) == (25, 145, 45)


def test_methods_are_compared_on_frames_without_a_text(processor, model, tmp_path):
    spec = f"rope_vniah:pixels={PIXELS}:depths=[0,1]:asks=column"
    comparison = Comparison(
        model=model,
        tokenizer=processor.tokenizer,
        text="",
        methods={"none": NoScaling(), "linear": Linear(factor=4.0)},
        lengths=(300, 400),
        tasks=(spec,),
        samples=1,
        processor=processor,
    )

    report = compare(comparison, tmp_path)

    plain, linear = (report.cell(label, spec, 400) for label in ("none", "linear"))
    assert plain["nll"] != linear["nll"]
    # images take fewer positions than tokens
    assert plain["positions"] < 250 < 300 < 400
    assert report.depths(spec) == [0, 1]
    with patched(model, Linear(factor=8.0)) as extended:
        own = evaluate(
            extended, processor.tokenizer, [spec], [400], samples=1, seed=0, processor=processor
        )
    assert own.cells[0]["n"] == 2
    again = compare(comparison, tmp_path)
    assert again.cells == report.cells


def test_the_command_loads_the_processor(processor, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    AutoProcessor.register(Qwen2_5_VLConfig, vision.ImagesProcessor, exist_ok=True)
    words = ["compare", str(tmp_path / "model"), "--methods", "none", "--samples", "1", "--json"]
    words += ["--tasks", f"rope_vniah_d:pixels={PIXELS}:period=2:depths=[1]", "--lengths", "400"]

    app([*words, "--output", str(tmp_path / "report")], standalone_mode=False)

    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["length"], cell["n"]) == (400, 1)
    assert cell["frames"] > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asks": "shape"}, "asks must be one of 'digit', 'row', 'column', got 'shape'"),
        ({"media": "film"}, "media must be one of 'images', 'video'"),
        ({"media": "video"}, "has no video processor .*torchvision"),
        ({"period": -1}, "period must be an integer of at least 0, got -1"),
        ({"pixels": 9}, "pixels must be an integer of at least 24"),
        ({"depth": "[1]"}, "has no option 'depth'. Did you mean 'depths'"),
    ],
)
def test_a_wrong_option_is_named(processor, options, message):
    with pytest.raises(RopeError, match=message):
        visual(processor, 400, **options)


def test_what_cannot_be_shown_is_one_clear_error(processor, monkeypatch):
    with pytest.raises(RopeError, match="needs the processor of a model that takes them; got None"):
        visual(None, 400)
    with pytest.raises(RopeError, match=r"got \w*Tokeniz"):
        visual(processor.tokenizer, 400)
    with pytest.raises(RopeError, match=r"a length of 150 is too short for 1 frame.* of 48 pixels"):
        visual(processor, 150).check((400, 150))
    with monkeypatch.context() as patch:
        patch.setattr(processor, "chat_template", None)
        with pytest.raises(RopeError, match="no chat template"):
            visual(processor, 400)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RopeError, match="need Pillow: pip install"):
        visual(processor, 400).check((400,))


def test_a_processor_whose_tokens_depend_on_the_picture_is_refused(processor, monkeypatch):
    measure = visual(processor, 400, depths="[0]")
    whole = FrameEncoder._process

    def longer(self, draft, frames):
        found = whole(self, draft, frames)
        if len({frame.tobytes() for frame in frames}) > 1:
            found["input_ids"] = found["input_ids"].repeat(1, 2)
        return found

    monkeypatch.setattr(FrameEncoder, "_process", longer)
    with pytest.raises(RopeError, match="token count depends on image content"):
        measure.run(nn.Linear(1, 1), 400, 1, nothing)
