"The regression test of the notebooks can fail: a figure too far off, a figure missing, parameters that did not arrive, a cell that must not run."
import ast
import json
import math
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import chapters
import run as regression
from tree import ROOT, notebooks

SET = 'device, steps, result_path, seed = "cpu", None, None, 0'
NAMES = ("device", "steps", "result_path", "seed")
READS_ONLY = ("index", "reference", "reproduce_the_tables") # nothing is computed there, or only as a first page shows it

def cell(source, *tags): return new_code_cell(source, metadata=dict(tags=list(tags)) if tags else {})
def executed(tmp_path, *cells, **parameters):
    path = tmp_path/"page.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A page"), *cells]), path)
    return chapters.execute(path, (), 120, regression.PROFILES["cpu"] | parameters), nbformat.read(path, as_version=4)

RECORD = cell("from posefree_kit.core import record\nrecord(result_path, quality_db=30 + seed + (steps or 5))")

def test_parameters_arrive_and_the_page_stays_as_it_was(tmp_path):
    ran, nb = executed(tmp_path, cell(SET, "parameters"), cell("#| eval: false\n1/0"), cell("#| slow\n1/0"), RECORD, seed=2, steps=7)
    assert ran.error == "" and ran.figures == dict(quality_db=39.) and ran.ending["time_ratio"] > 0
    assert [c.source for c in nb.cells[1:]] == [SET, "#| eval: false\n1/0", "#| slow\n1/0", RECORD.source] and not any("papermill" in c.metadata for c in nb.cells)
    assert "39" in nb.cells[-1].outputs[0].data["text/markdown"] and not nb.cells[2].outputs

@pytest.mark.parametrize("cells, error", [((cell(SET), RECORD), "parameters did not arrive"), # the tag is lost
                                          ((cell(SET, "parameters"), cell("for seed in range(3): pass"), RECORD), "parameters were changed in the notebook: at the end {'seed': 2}"),
                                          ((cell(SET, "parameters"), cell("x = 1")), "no figure")], ids=["no tag", "changed", "no figure"])
def test_what_went_wrong_with_the_parameters_is_told(tmp_path, cells, error):
    ran, _ = executed(tmp_path, *cells)
    assert error in ran.error

def test_papermill_alone_would_run_what_must_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "skipped", lambda source, flags=(): False)
    ran, _ = executed(tmp_path, cell(SET, "parameters"), cell("#| eval: false\n1/0"), RECORD)
    assert ran.error.startswith("cell 2") and "ZeroDivisionError" in ran.error

GOLDEN = dict(psnr_db=dict(value=30., better="higher", atol=1., rtol=0.), total_loss=dict(value=.5, better="lower", atol=0., rtol=.1), found_count=dict(value=8., better="same", atol=0., rtol=0.))
GOOD = {k: g["value"] for k, g in GOLDEN.items()}

def test_a_figure_may_get_better_and_must_not_get_worse():
    assert regression.compare(GOOD, GOLDEN) == ([], [])
    assert regression.compare(GOOD | dict(psnr_db=29.1, total_loss=.54), GOLDEN)[0] == [] and len(regression.compare(GOOD | dict(psnr_db=35., total_loss=.1), GOLDEN)[1]) == 2 # better: told as moved
    for change in (dict(psnr_db=28.9), dict(total_loss=.56), dict(found_count=9.), dict(found_count=7.), dict(psnr_db=math.nan)):
        failures, _ = regression.compare(GOOD | change, GOLDEN)
        assert len(failures) == 1 and failures[0].startswith([*change][0])

def test_a_golden_that_was_moved_fails():
    for name, by in (("psnr_db", 1.1), ("total_loss", -.06), ("found_count", 1.)):
        moved = GOLDEN | {name: GOLDEN[name] | dict(value=GOLDEN[name]["value"] + by)}
        assert [f for f in regression.compare(GOOD, moved)[0] if f.startswith(name)], name

def test_missing_and_unknown_figures_fail():
    assert regression.compare({k: v for k, v in GOOD.items() if k != "psnr_db"}, GOLDEN)[0] == ["psnr_db: missing"]
    assert "no golden" in regression.compare(GOOD | dict(more=1.), GOLDEN)[0][0] and "no goldens" in regression.compare(GOOD, None)[0][0]

def test_renewing_keeps_directions_and_tolerances():
    new = regression.renewed(GOOD | dict(psnr_db=33., new_deg=2.), GOLDEN)
    assert new["psnr_db"] == GOLDEN["psnr_db"] | dict(value=33.) and new["new_deg"] == dict(value=2.) | regression.rule("new_deg") and regression.rule("new_deg")["better"] == "lower"
    assert set(regression.renewed(dict(psnr_db=1.), GOLDEN)) == {"psnr_db"} # what is no longer recorded goes

def test_renewing_one_notebook_does_not_say_that_all_were_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "GOLDENS", tmp_path); monkeypatch.setattr(regression, "notebooks", lambda: [tmp_path/f"{n}.ipynb" for n in ("a", "b")]); monkeypatch.setattr(regression, "circumstances", lambda: dict(torch="new"))
    ran = lambda *names, error="": {n: chapters.Ran(error, 1., GOOD, dict(time_ratio=10.)) for n in names}
    def made(which, goldens): regression.renew("cpu", which, goldens); return regression.read("cpu")["made_with"]["torch"]
    old = dict(made_with=dict(torch="old"), notebooks=dict(a=GOLDEN, b=GOLDEN, gone=GOLDEN))
    assert [made(ran("a"), old), made(ran("a", "b"), old), made(ran("a") | ran("b", error="no"), old), made(ran("a"), None)] == ["old", "new", "old", "new"]

def test_a_report_counts_what_failed(capsys):
    ran = lambda **changes: dict(page=chapters.Ran("", 1., GOOD | changes, dict(time_ratio=10.)), broken=chapters.Ran("cell 3: no", 1.))
    goldens = dict(made_with={}, notebooks=dict(page=GOLDEN | dict(time_ratio=dict(value=8., better="lower", atol=0., rtol=1.))))
    assert regression.report("cpu", ran(), goldens) == 1 and "moved  time_ratio: 8 -> 10" in capsys.readouterr().out
    assert regression.report("cpu", ran(psnr_db=20.), goldens) == 2 and "FAILED psnr_db: 20, golden 30" in capsys.readouterr().out
    assert regression.report("cuda", ran(), None) == 1 and "no goldens of profile cuda" in capsys.readouterr().out

# --- the notebooks themselves

def code(path): return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
def stored(tree) -> set: # names that a cell assigns for the cells after it: not in functions and comprehensions
    inner = (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    found = {tree.id} if isinstance(tree, ast.Name) and isinstance(tree.ctx, ast.Store) else {tree.name} if isinstance(tree, (ast.FunctionDef, ast.ClassDef)) else set()
    return found.union(*(stored(n) for n in ast.iter_child_nodes(tree) if not isinstance(n, inner)))

@pytest.mark.parametrize("path", [p for p in notebooks() if any(c.source.strip() for c in code(p))], ids=lambda p: p.stem)
def test_each_notebook_takes_parameters_uses_them_and_leaves_figures(path):
    cells = code(path)
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1 and SET in tagged[0].source, "expected one cell, tagged `parameters`, with " + SET
    others = [c.source for c in cells if c is not tagged[0] and not chapters.skipped(c.source)]
    assert not [n for s in others for n in stored(ast.parse(s)) if n in NAMES], "a cell assigns a parameter: what papermill gave would be lost"
    assert [s for s in others if re.search(r"^record\(result_path, ", s, re.M)] == others[-1:], "expected `record(result_path, ...)` in the last cell, and there alone"
    used = {n.id for s in others for n in ast.walk(ast.parse(s)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    wanted = {"device", "seed"} if path.stem not in READS_ONLY else set()
    if re.search("how many (training )?steps (?!\\()|steps of", tagged[0].source): wanted |= {"steps"}
    assert wanted <= used, f"{wanted - used} given and not used"

def test_goldens_are_of_the_notebooks_that_there_are():
    goldens = regression.read("cpu")
    assert set(goldens["notebooks"]) == {p.stem for p in notebooks() if any(c.source.strip() for c in code(p))}
    for name, figures in goldens["notebooks"].items():
        assert len(figures) > 1 and "time_ratio" in figures, name
        assert all(set(g) == {"value", "better", "atol", "rtol"} and g["better"] in ("higher", "lower", "same") and g["atol"] >= 0 <= g["rtol"] and g["atol"] + g["rtol"] < 40 for g in figures.values()), name
    cuda = regression.read("cuda")
    assert cuda is None or cuda["made_with"]["torch"] # absent until a CUDA machine has written it

def test_steps_seed_and_device_change_what_a_chapter_computes(tmp_path):
    "The last cell of chapter 08, in this process"
    from posefree_kit import core, training
    last = code(ROOT/"nbs"/"08_training.ipynb")[-1].source
    space = {**vars(training), "record": core.record, "data": training.UnposedImages.portraits(8, 32)}
    def told(**changes):
        exec(last, space | dict(device="cpu", steps=1, seed=0, result_path=tmp_path/"f.json") | changes)
        return json.loads((tmp_path/"f.json").read_text())
    plain = told()
    assert told() == plain and told(seed=1) != plain and told(steps=2) != plain
    with pytest.raises((RuntimeError, AssertionError)): told(device="cuda:99")
