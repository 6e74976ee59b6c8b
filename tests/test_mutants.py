"""The mistakes that the tests are tried on."""

import ast

import pytest
from mutants import PACKAGES, ROOMS, ROOT, _interval, files_of, mutants_of

from hf_rope_ext.evals.statistics import wilson

FILE = "hf_rope_ext/methods/dynamic.py"


def test_a_mutant_is_a_whole_file_that_can_be_parsed_and_differs():
    text = (ROOT / FILE).read_text()
    found = mutants_of(FILE)

    assert len({mutant.source for mutant in found}) == len(found) > 20
    assert all(ast.dump(ast.parse(one.source)) != ast.dump(ast.parse(text)) for one in found)
    names = " ".join(mutant.name for mutant in found)
    assert "Dynamic.plan_at: ratio = torch.clamp(" in names
    assert "length_dependent: return True -> return False" in names  # a property
    assert 'Dynamic: name = "dynamic" -> name = None' in names  # a class's body
    assert '"""' not in names


def test_a_line_is_known_inside_functions_and_is_every_tests_at_import():
    text = (ROOT / FILE).read_text().splitlines()
    for mutant in mutants_of(FILE):
        function = mutant.name.partition(":")[0]
        assert bool(mutant.lines) == ("." in function)
        for line in mutant.lines:
            assert text[line - 1].strip().split(" = ")[0] in mutant.name


def test_every_room_has_files_and_tests():
    for room, (_, tests) in ROOMS.items():
        assert files_of(room)
        assert all(file.partition("/")[0] in PACKAGES for file in files_of(room))
        for test in tests.split():
            assert (ROOT / "tests" / test).exists()


def test_the_interval_of_a_sample_is_wilsons():
    assert _interval(55, 60, 100) == pytest.approx(wilson(55 / 60, 60), abs=1e-3)
    assert _interval(60, 60, 60) is None
