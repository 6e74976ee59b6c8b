"""Break the library one place at a time, and count how many of the mistakes the tests catch.

``python benchmarks/mutants.py methods positions`` tries the mistakes of these rooms, and
``--record`` writes them into the result file and renders docs/testing.md. The mistakes are those
that mutmut makes of a piece of code: another operator, a constant off by one, an argument left out
or None, a condition turned round. All code of a file is mistaken, also what mutmut's own runner
leaves out (properties, class bodies, tables): a mutant is a file's whole text, handed to Python's
import system in a process of its own. That process is forked from one that has imported torch and
transformers and nothing of this library, so a mutant costs a second or two and no file is touched.

Where a room has more mutants than ``--sample``, a seeded sample of them is tried. A mutant is
tried with the tests that run its line, those first that have caught others
or are quick.
"""

import argparse
import ast
import difflib
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

import coverage
import libcst as cst
import pytest
from equivalent_mutants import EQUIVALENT
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import deep_replace
from mutmut.mutation.mutators import mutation_operators
from recording import RESULTS, record

ROOT = Path(__file__).parent.parent
PACKAGES = ("hf_rope_ext", "patches", "eval_tasks")
SEED = 0

# of each room, the files that are mistaken and the tests that must notice
ROOMS: dict[str, tuple[str, str]] = {
    "geometry": ("geometry.py checks.py", "test_geometry.py test_checks.py methods"),
    "methods": ("methods", "methods"),
    "positions": ("positions", "positions"),
    "rope_config": (
        "models/rope_config.py",
        "models/test_rope_config.py saving/test_engines.py patching/test_patch.py",
    ),
    "sites": (
        "models/sites.py models/temperature.py",
        "models/test_sites.py models/test_trained_length.py models/test_rope_config.py "
        "models/test_temperature.py patching/test_patch.py "
        "patching/test_probe.py patching/test_describe.py",
    ),
    "rotary": (
        "rotary",
        "rotary patching/test_patch.py cache/test_lengths.py cache/test_boundaries.py",
    ),
    "cache": ("cache", "cache patching/test_cache_proof.py"),
    "patching": (
        "patching changes.py",
        "patching saving/test_adapters.py positions/test_placement.py rotary/test_vision_towers.py",
    ),
    "saving": ("saving", "saving finetune/test_finetune_adapter.py"),
    "scoring": ("evals/scoring.py", "evals/test_scoring.py"),
    "statistics": ("evals/statistics.py", "evals/test_statistics.py"),
    "measures": (
        "evals/measures.py",
        "evals/test_evals.py evals/test_compare.py evals/test_visual_documents.py",
    ),
    "documents": ("evals/documents.py", "evals/test_documents.py"),
    "tasks": ("evals/tasks/base.py", "evals/test_documents.py"),
    "loss": ("finetune/loss.py", "finetune/test_finetune_loss.py"),
    "sequences": (
        "finetune/sequences.py finetune/pose.py",
        "finetune/test_sequences.py",
    ),
    "lora": ("finetune/lora.py", "finetune/test_finetune_adapter.py"),
}

# What an error says is held by the tests of messages, and what a name or a type is by mypy.
LEFT_OUT = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise, cst.Assert)
CALLS_LEFT_OUT = {"len", "isinstance", "warn", "cast", "TypeVar"}


@dataclass(frozen=True)
class Mutant:
    """One mistake in one file.

    Attributes:
        file: Of the library, relative to the repository.
        name: What tells it from the file's others: the function, and the lines before and after.
        lines: Of the statement that is mistaken; none for what runs when the file is imported.
        source: The mistaken text of the file.
    """

    file: str
    name: str
    lines: frozenset[int]
    source: str


class Mistakes(cst.CSTVisitor):
    """Collects every mistake mutmut can make in a file."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, frozenset[int]]] = []
        self._functions: list[str] = []
        self._statements: list[frozenset[int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Note what can be mistaken in a node; return whether to look into it."""
        if isinstance(node, LEFT_OUT) or _name_of_call(node) in CALLS_LEFT_OUT or _is_listed(node):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._functions.append(node.name.value)
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self._statements.append(self._lines_of(node))
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                name, lines = ".".join(self._functions), self._statements[-1:] or [frozenset()]
                self.found += [(node, made, name, lines[0]) for made in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:  # type: ignore[override]
        """Leave a function or a statement."""
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._functions.pop()
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self._statements.pop()

    def _lines_of(self, node: cst.CSTNode) -> frozenset[int]:
        """Return the lines of a statement inside a function, without those of its body."""
        where = self.get_metadata(PositionProvider, node)
        last = where.end.line
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            return frozenset()  # defaults: computed when the file is imported
        if not self._functions or self._functions[-1][:1].isupper():
            return frozenset()
        body = getattr(node, "body", None)
        if isinstance(body, cst.IndentedBlock):
            first = self.get_metadata(PositionProvider, body.body[0]).start.line
            last = max(where.start.line, first - 1)
        return frozenset(range(where.start.line, last + 1))


def _name_of_call(node: cst.CSTNode) -> str | None:
    function = node.func if isinstance(node, cst.Call) else None
    if isinstance(function, cst.Attribute):
        return function.attr.value
    return function.value if isinstance(function, cst.Name) else None


def _is_listed(node: cst.CSTNode) -> bool:
    """Return whether a node is a string on its own, the list of public names or a type's name."""
    if isinstance(node, cst.Assign) and isinstance(name := node.targets[0].target, cst.Name):
        return name.value == "__all__" or (name.value[0].isupper() and not name.value.isupper())
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)


def mutants_of(file: str) -> list[Mutant]:
    """Return all mutants of a file that Python can parse and that differ from it and each other."""
    text = (ROOT / file).read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    mistakes = Mistakes()
    wrapper.visit(mistakes)
    found = {}
    for node, made, function, lines in mistakes.found:
        source = deep_replace(wrapper.module, node, made).code
        if source in found or _same(text, source):
            continue
        found[source] = Mutant(file, f"{function}: {_change(text, source)}", lines, source)
    return list(found.values())


class _WithoutStrict(ast.NodeTransformer):
    """Takes away zip's ``strict``, an assertion."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return self.generic_visit(node)


def _same(text: str, source: str) -> bool:
    try:
        before, after = (_WithoutStrict().visit(ast.parse(code)) for code in (text, source))
    except SyntaxError:
        return True
    return ast.dump(before) == ast.dump(after)


def _change(before: str, after: str) -> str:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))
    old, new = (
        " ".join(line[1:].strip() for line in lines[2:] if line[0] == sign) for sign in "-+"
    )
    return f"{old} -> {new}"


def files_of(room: str) -> list[str]:
    """Return the files of a room, relative to the repository."""
    paths = [ROOT / "hf_rope_ext" / name for name in ROOMS[room][0].split()]
    files = [file for path in paths for file in ([path] if path.is_file() else path.glob("*.py"))]
    return sorted(str(file.relative_to(ROOT)) for file in files)


class _Mistaken(importlib.machinery.SourceFileLoader):
    """Loads a mutant's text in place of its file."""

    mutant: Mutant

    def get_code(self, fullname: str) -> Any:
        return compile(self.mutant.source, str(ROOT / self.mutant.file), "exec", dont_inherit=True)


class _Finder:
    """Finds the mistaken module; all others are found as ever."""

    def __init__(self, mutant: Mutant) -> None:
        parts = list(Path(mutant.file).with_suffix("").parts)
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        file = ROOT / self.mutant.file
        loader = _Mistaken(name, str(file))
        loader.mutant = self.mutant
        within = [str(file.parent)] if self.is_package else None
        return importlib.util.spec_from_file_location(
            name, file, loader=loader, submodule_search_locations=within
        )


class _Order:
    """Runs some of the tests, in an order; ends the process at the first that fails."""

    def __init__(self, tests: Sequence[str] | None, note: Path) -> None:
        self.place = None if tests is None else {test: at for at, test in enumerate(tests)}
        self.note = note

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.place is not None:
            items[:] = [item for item in items if item.nodeid in self.place]
            items.sort(key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.note.write_text(report.nodeid)
            os._exit(1)


class _Watch:
    """Notes which lines of the watched files each test runs, and what is imported meanwhile."""

    def __init__(self, files: Sequence[str], note: Path) -> None:
        self.coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / file) for file in files], config_file=False
        )
        self.tests: dict[str, float] = {}
        self.running = ""
        self.note = note

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.running, began = item.nodeid, time.monotonic()
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")
        self.tests[item.nodeid] = time.monotonic() - began

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        # what a fixture does for many tests is not the first one's alone
        shared = fixturedef.scope != "function"
        self.coverage.switch_context("" if shared else self.running)
        yield
        self.coverage.switch_context(self.running)

    def pytest_sessionstart(self) -> None:
        self.coverage.start()

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        ran = {
            str(Path(file).relative_to(ROOT)): {
                str(line): sorted(contexts)
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        modules = [name for name in sys.modules if not _is_own(name)]
        self.note.write_text(json.dumps({"ran": ran, "tests": self.tests, "modules": modules}))


def _is_own(module: str) -> bool:
    origin = getattr(sys.modules[module], "__file__", None) or ""
    return module.split(".")[0] in PACKAGES or str(ROOT / "tests") in origin or "." not in origin


def _run(tests: Sequence[str], plugin: Any) -> int:
    words = ["-x", "-q", "--no-header", "--assert", "plain"]
    words += ["-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed", "0"]
    words += ["--rootdir", str(ROOT), "-m", "not slow and not gpu and not sweep", *tests]
    return int(pytest.main(words, plugins=[plugin]))


def _forked(action: Any, seconds: float) -> int | None:
    """Return the exit status of an action in a process of its own; None if it took too long."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            if not os.environ.get("MUTANTS_DEBUG"):
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
            memory = _memory() + 12 * 2**30  # a mistaken size must not take the machine
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            status = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def try_mutant(mutant: Mutant, paths: Sequence[str], tests: Sequence[str], note: Path) -> int:
    """Run the tests on a mutant, in this process; return pytest's exit status."""
    sys.meta_path.insert(0, _Finder(mutant))
    os.chdir(note.parent)
    return _run([*paths, "--basetemp", str(note.parent / "temporary")], _Order(tests, note))


def try_room(room: str, size: int) -> dict[str, Any]:
    """Try the mutants of a room, or a sample of them, and return how they ended."""
    files, paths = files_of(room), [str(ROOT / "tests" / p) for p in ROOMS[room][1].split()]
    everything = [mutant for file in files for mutant in mutants_of(file)]
    chosen = everything
    if len(everything) > size:
        chosen = random.Random(SEED).sample(everything, size)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note"
        if _forked(lambda: _run(paths, _Watch(files, note)), 1800) != 0:
            raise SystemExit(f"{room}: the tests fail on the code as it is")
        watched = json.loads(note.read_text())
        for name in watched["modules"]:
            if name not in sys.modules:
                try:
                    importlib.import_module(name)
                except Exception:  # a module that only imports within another
                    continue
        gc.freeze()  # a collection would copy all that the processes share
        whole = sum(watched["tests"].values())
        print(
            f"{room}: {len(chosen)} of {len(everything)} mutants, tests {whole:.1f} s", flush=True
        )
        kills: dict[str, int] = dict.fromkeys(watched["tests"], 0)
        ends: dict[str, list[Mutant]] = {"killed": [], "survived": [], "timeout": []}
        for mutant in chosen:
            tests = _tests_of(mutant, watched)
            tests.sort(key=lambda test: (-kills[test], watched["tests"][test]))
            note.write_text("")
            action = functools.partial(try_mutant, mutant, paths, tests, note)
            # no test runs the line: nothing can notice
            status = _forked(action, 10 * whole + 30) if tests else 0
            end = "timeout" if status is None else "killed" if status else "survived"
            ends[end].append(mutant)
            if (by := note.read_text()) in kills:
                kills[by] += 1
            if end != "killed":
                print(f"{end}: {mutant.file} {mutant.name} ({len(tests)} tests)", flush=True)
    return _summary(room, files, everything, chosen, ends, time.monotonic() - began)


def _tests_of(mutant: Mutant, watched: dict[str, Any]) -> list[str]:
    """Return the tests that run a mutant's line; all tests for what runs at import."""
    tests = list(watched["tests"])
    if not mutant.lines:
        return tests
    lines = watched["ran"].get(mutant.file, {})
    some = {test for line in mutant.lines for test in lines.get(str(line), ())}
    return tests if "" in some else [test for test in tests if test in some]


def _summary(
    room: str,
    files: list[str],
    everything: list[Mutant],
    chosen: list[Mutant],
    ends: dict[str, list[Mutant]],
    seconds: float,
) -> dict[str, Any]:
    caught = len(ends["killed"]) + len(ends["timeout"])
    survivors = [f"{mutant.file} {mutant.name}" for mutant in ends["survived"]]
    return {
        "files": files,
        "tests": ROOMS[room][1].split(),
        "mutants": len(everything),
        "tried": len(chosen),
        "killed": len(ends["killed"]),
        "timeouts": len(ends["timeout"]),
        "survived": len(survivors),
        "caught": round(caught / len(chosen), 3),
        "interval": _interval(caught, len(chosen), len(everything)),
        "seconds": round(seconds),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("-dirty" if _git("status", "--porcelain", "hf_rope_ext", "patches", "tests") else ""),
        "survivors": survivors,
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _interval(caught: int, tried: int, everything: int) -> list[float] | None:
    """Return Wilson's interval of the share caught, at 95 %; None if all were tried."""
    if tried == everything:
        return None
    z, share = 1.96, caught / tried
    middle = share + z * z / (2 * tried)
    reach = z * sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    return [round((middle + sign * reach) / (1 + z * z / tried), 3) for sign in (-1, 1)]


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown: a table, and the survivors that were read."""
    equivalent = {name for names in EQUIVALENT.values() for name in names}
    lines = [
        "| room | mutants | tried | killed | timeouts | survived | of them equivalent | caught |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for room, found in results.items():
        same = equivalent & set(found["survivors"])
        caught = f"{found['caught']:.1%}"
        if found["interval"]:
            low, high = found["interval"]
            caught += f" ({low:.1%} to {high:.1%})"
        cells = [found[name] for name in ("mutants", "tried", "killed", "timeouts", "survived")]
        lines.append(f"| {' | '.join(map(str, [room, *cells, len(same), caught]))} |")
    for why, names in EQUIVALENT.items():
        lines += ["", f"{why}:", "", *(f"- `{name}`" for name in names)]
    return "\n".join(lines)


def main() -> int:
    """Try the rooms asked for; return 1 if one catches too few."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", help=f"by default all: {' '.join(ROOMS)}")
    parser.add_argument("--sample", type=int, default=60, help="the most mutants of a room")
    parser.add_argument("--record", action="store_true", help="write the result file and the page")
    asked = parser.parse_args()
    if unknown := set(asked.rooms) - set(ROOMS):
        parser.error(f"rooms are {', '.join(ROOMS)}, got {', '.join(sorted(unknown))}")
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.mkdtemp())
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    file, known = RESULTS / "mutants.json", {}
    if file.exists():
        known = json.loads(file.read_text())["results"]
    tried = {}
    for room in asked.rooms or ROOMS:
        tried[room] = try_room(room, asked.sample)
        print(f"{room}: {tried[room]['caught']:.1%} in {tried[room]['seconds']} s", flush=True)
        if asked.record:
            known = {name: {**known, **tried}[name] for name in ROOMS if name in {**known, **tried}}
            record("mutants", known, sample=asked.sample, seed=SEED, mutmut=version("mutmut"))
    print(render(tried))
    if asked.record:
        page = ROOT / "docs" / "testing.md"
        start, end = "<!-- rendered by benchmarks/mutants.py -->", "<!-- end of mutants -->"
        before, _, rest = page.read_text().partition(start)
        page.write_text(f"{before}{start}\n{render(known)}\n{end}{rest.partition(end)[2]}")
    equivalent = {name for names in EQUIVALENT.values() for name in names}
    missed = [set(found["survivors"]) - equivalent for found in tried.values()]
    tries = [found["tried"] for found in tried.values()]
    return int(any(len(some) > 0.1 * of for some, of in zip(missed, tries, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
