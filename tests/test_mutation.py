"""The mutation test: its mutants, the choice of tests, and that a trial imports the mutant."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from ldm.errors import UserError
from mutation.covered import Case, Coverage, Fixture, uses_of_names
from mutation.mutants import functions_by_line, mutants_of, mutated
from mutation.trials import Finder
from support import ROOT

SOURCE = '''"""A docstring."""
import math
LIMIT: int = 4

class Loss:
    """A docstring with 1."""
    weight: float = 0.5

    def __call__(self, x: "Tensor[2]", scale=2) -> int:
        """Return 1."""
        if x < LIMIT and not self.weight:
            raise ValueError(f"{x - 1} is below {LIMIT}")
        self.last = x
        warnings.warn(f"{x + 1}", stacklevel=2)
        return -math.sqrt(x, base=scale)
'''
EXPECTED = """
: constant: 4 → 5
: constant: 4 → 3
Loss: constant: 0.5 → 1.5
Loss: constant: 0.5 → -0.5
Loss.__call__: default: constant: 2 → 3
Loss.__call__: default: constant: 2 → 1
Loss.__call__: boolean: x < LIMIT and (not self.weight) → x < LIMIT or not self.weight
Loss.__call__: condition: x < LIMIT and (not self.weight) → not (x < LIMIT and (not self.weight))
Loss.__call__: comparison: x < LIMIT → x <= LIMIT
Loss.__call__: comparison: x < LIMIT → x >= LIMIT
Loss.__call__: condition: not self.weight → self.weight
Loss.__call__: statement left out: raise ValueError(f'{x - 1} is below {LIMIT}') → pass
Loss.__call__: statement left out: self.last = x → pass
Loss.__call__: statement left out: warnings.warn(f'{x + 1}', stacklevel=2) → pass
Loss.__call__: return value: return -math.sqrt(x, base=scale) → return None
Loss.__call__: sign: -math.sqrt(x, base=scale) → math.sqrt(x, base=scale)
Loss.__call__: argument left out: base=scale → nothing
"""


def test_mutants_are_faults_in_the_code_and_not_in_messages_or_annotations() -> None:
    names = {f"{m.function}: {m.operator}: {m.before} → {m.after}" for m in mutants_of("a.py", SOURCE)}
    assert names == set(EXPECTED.strip("\n").splitlines())


def test_each_mutant_differs_from_the_code_and_has_a_name_of_its_own() -> None:
    for file in ("ldm/schedule.py", "train/stages/vae.py"):
        source = (ROOT / file).read_text()
        mutants = mutants_of(file, source)
        assert len({m.name for m in mutants}) == len(mutants)
        before = ast.unparse(ast.parse(source)).splitlines()
        for mutant in mutants[::20]:
            tree = mutated(source, mutant.index)
            after = ast.unparse(tree).splitlines()
            compile(tree, file, "exec")
            assert after != before, mutant.name


def test_a_sample_is_the_same_after_a_change_elsewhere() -> None:
    before = {m.name: m.rank(3) for m in mutants_of("a.py", SOURCE)}
    changed = SOURCE.replace("class Loss", "def other(a):\n    return a + 1\n\nclass Loss")
    after = {m.name: m.rank(3) for m in mutants_of("a.py", changed)}
    assert before.items() <= after.items()
    assert len(after) > len(before)
    assert {m.rank(4) for m in mutants_of("a.py", SOURCE)}.isdisjoint(before.values())


def test_a_trial_imports_the_mutant() -> None:
    file = "ldm/timesteps.py"
    (mutant,) = [
        m for m in mutants_of(file, (ROOT / file).read_text()) if m.before.startswith("raise UserError(f'logit")
    ]
    import ldm.timesteps

    with pytest.raises(UserError):
        ldm.timesteps.LogitNormal(std=0.0)
    specification = Finder(mutant).find_spec("ldm.timesteps", [str(ROOT / "ldm")])
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ldm.timesteps", module)
        specification.loader.exec_module(module)
    assert module.LogitNormal(std=0.0).std == 0.0


def test_tests_that_execute_the_line_are_chosen_the_quick_ones_first(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    first = functions_by_line(SOURCE)[15][1]
    function, line = f"{path}:Loss.__call__", 15 - first

    tests = [
        Case("slow", 3.0, [], {function: [line]}),
        Case("quick", 0.1, [], {function: [line]}),
        Case("same[2]", 0.3, [], {function: [line]}),
        Case("same[1]", 0.2, [], {function: [line]}),
        Case("other line", 0.0, [], {function: [1]}),
        Case("fixture", 0.0, ["training"], {}),
        Case("elsewhere", 0.0, [], {"b.py:f": [1]}),
    ]
    coverage = Coverage(tmp_path, tests, {"training": Fixture(9.0, {function: [line]})})
    uses = uses_of_names([str(path)])
    mutants = {m.operator: m for m in mutants_of(str(path), SOURCE)}
    chosen = [t.name for t in coverage.choose(mutants["sign"], uses, 60.0, 9)]
    assert chosen == ["quick", "same[1]", "same[2]", "slow", "fixture"]
    assert [t.name for t in coverage.choose(mutants["sign"], uses, 3.5, 9)] == ["quick", "same[1]", "same[2]"]
    of_constant = {t.name for t in coverage.choose(mutants["constant"], uses, 60.0, 9)}
    assert of_constant == {t.name for t in tests} - {"elsewhere"}
