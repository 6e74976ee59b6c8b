"""The trained check of scaling by axis asks what it says it asks."""

import numpy as np
import pytest
import reader
import scenes
import torch
from mrope_axes import SETTINGS, grown_videos, patch
from torch import Generator
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

pytestmark = pytest.mark.filterwarnings("ignore::hf_rope_ext.errors.RopeWarning")


@pytest.fixture(scope="module")
def model():
    return reader.build(SETTINGS["spatial"].recipe, seed=0)


def answers(glyphs, positions, question, distances):
    """What a reader finds that sees glyphs, and how far before the question they stand."""
    axis = 0 if question < 8 else 1 if question < 11 else 2
    wanted = question - (0, 8, 11)[axis]
    *before, asked = positions[axis].tolist()
    return {
        glyph
        for glyph, place in zip(glyphs.flatten().tolist(), before[2:], strict=True)
        if round(place - asked) == wanted - distances[axis] and glyph // 8 == axis
    }


@pytest.mark.parametrize("setting", ["spatial", "max"])
@pytest.mark.parametrize(
    ("condition", "times", "way"),
    [
        ("dense", 1, "none"),
        ("dense", 4, "visual positions, centred"),
        ("dense", 4, "frame times"),
        ("long", 2, "none"),
        ("large", 2, "visual positions, centred"),
    ],
)
def test_positions_tell_every_answer(model, monkeypatch, setting, condition, times, way):
    monkeypatch.setattr("mrope_axes.VIDEOS", 4)
    behind = SETTINGS[setting].next_text == "max"
    videos = grown_videos(condition, times, behind, Generator().manual_seed(0))
    words = reader.prompt(videos, seconds=1 / times if way == "frame times" else 1.0)
    grown = "hw" if condition == "large" else "t"
    with patch(model, SETTINGS[setting], way, times, grown):
        positions = model.model.get_rope_index(**words)[0]

    distances = (3, 3, 3)
    if behind:
        distances = (8, 16, 16) if condition == "long" else (8, 8, 8)
    for row, (glyphs, expected) in enumerate(zip(videos.glyphs, videos.answers, strict=True)):
        for question, token in enumerate(expected.tolist()):
            found = answers(glyphs, positions[:, row], question, distances)
            assert found == {token - scenes.FIRST_ANSWER}


def test_without_its_axis_a_question_has_no_answer(model):
    videos = scenes.videos(Generator().manual_seed(0), 4)
    positions = model.model.get_rope_index(**reader.prompt(videos))[0]

    for axis, questions in enumerate(scenes.AXES.values()):
        blind = positions.clone()
        blind[axis, :, 2:-1] = blind[axis, :, 2:-1].flatten()[torch.randperm(4 * 72)].view(4, 72)
        for question in range(questions.start, questions.stop):
            found = [answers(videos.glyphs[n], blind[:, n], question, (3, 3, 3)) for n in range(4)]
            assert any(len(several) > 1 for several in found)


def test_pixels_are_laid_out_as_the_image_processor_does():
    glyphs = scenes.videos(Generator().manual_seed(0), 1).glyphs
    frames = scenes.draw(glyphs, Generator().manual_seed(1))
    processor = Qwen2VLImageProcessorPil(
        patch_size=scenes.PATCH, merge_size=scenes.MERGE, do_resize=False
    )

    images = [np.asarray(frame.permute(1, 2, 0)) for frame in frames[0]]
    expected = processor(images, return_tensors="pt")

    torch.testing.assert_close(scenes.patches(frames), expected["pixel_values"])
    assert expected["image_grid_thw"].tolist() == [[1, 6, 6]] * 8


def test_drawn_glyphs_differ_and_fit_their_cells():
    drawn = scenes.atlas()[:, :, 0].float()
    edges = torch.cat([drawn[..., 0, :], drawn[..., -1, :], drawn[..., 0], drawn[..., -1]], -1)

    assert len(scenes.GLYPHS) == len(set(scenes.GLYPHS)) == 40
    assert torch.pdist(drawn.flatten(0, 1).flatten(1)).min() > 255
    assert not edges.any()


@pytest.mark.sweep
@torch.no_grad()
def test_the_tower_tells_glyphs_apart_and_not_places(model):
    videos = scenes.videos(Generator().manual_seed(0), 2, zoom=2)
    where = scenes.places(videos.glyphs, Generator().manual_seed(1))
    pixels = scenes.patches(scenes.draw(videos.glyphs, Generator().manual_seed(1)))
    atlas = scenes.atlas().flatten(0, 1)[:, None]
    alone = reader.features(model, scenes.patches(atlas), torch.tensor([[1, 2, 2]] * len(atlas)))

    seen = reader.features(model, pixels, videos.grid)

    by_glyph = alone.view(40, 9, -1)
    torch.testing.assert_close(seen, by_glyph[videos.glyphs, where].flatten(1, 3))
    assert torch.pdist(by_glyph.flatten(0, 1)).min() > 0.01


@pytest.mark.sweep
@torch.no_grad()
@pytest.mark.parametrize("way", ["yarn, grown axes", "visual positions", "frame times"])
def test_all_questions_at_once_are_answered_as_one_by_one(model, way):
    generator = Generator().manual_seed(0)
    videos = scenes.videos(generator, 2, hold=2)
    pixels = scenes.patches(scenes.draw(videos.glyphs, generator))
    seconds = 0.5 if way == "frame times" else 1.0

    with patch(model, SETTINGS["max"], way, 2, "t"):
        found = reader.read(model, videos, reader.features(model, pixels, videos.grid), seconds)
        alone = reader.one_by_one(model, videos, pixels, seconds)
        generated = model.generate(
            **reader.prompt(videos, 3, seconds),
            pixel_values_videos=pixels,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )

    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 3], generated.logits[0], atol=1e-4, rtol=1e-4)
