"The tools that the other checks stand on must themselves be able to fail."
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import agree
import chapters
import readme
import tree

def test_skipped_cells():
    assert chapters.skipped("#| eval: false\n1/0") and chapters.skipped("#| slow\nx") and not chapters.skipped("#| slow\nx", ["slow"])
    assert not chapters.skipped("#| export\n#| hide\nx = 1  # eval: false")

def test_the_driver_runs_a_chapter_and_tells_a_failure(tmp_path):
    def run(*sources, timeout=60):
        path = tmp_path/"chapter.ipynb"
        nbformat.write(new_notebook(cells=[new_code_cell(s) for s in sources]), path)
        return chapters.execute(path, (), timeout).error, nbformat.read(path, as_version=4)
    error, nb = run("x = 6", "#| eval: false\n1/0", "print(x * 7)")
    assert error == "" and nb.cells[2].outputs[0].text == "42\n" and not nb.cells[1].outputs
    error, _ = run("x = 6", "assert x == 7, 'six is not seven'")
    assert error.startswith("cell 1") and "six is not seven" in error and "\x1b" not in error
    error, _ = run("import time; time.sleep(60)", timeout=4)
    assert error == "took longer than 4 s"

def test_a_kernel_that_never_began_is_asked_again():
    def ask(deaths, why="Kernel died before replying to kernel_info"):
        said = iter([RuntimeError(why)] * deaths)
        def run():
            for e in said: raise e
            return "done"
        return run
    assert chapters.begun(ask(0)) == chapters.begun(ask(2)) == "done"
    for bad in (ask(3), ask(1, "Kernel died")):
        with pytest.raises(RuntimeError, match="Kernel died"): chapters.begun(bad)

def test_unknown_chapters_are_refused():
    with pytest.raises(SystemExit, match="99_nothing"): tree.notebooks(["99_nothing"])

def test_disagreement_is_named(monkeypatch):
    real = agree.files
    def meddled(root):
        found = real(root)
        if root == tree.ROOT: found["posefree_kit/core.py"] += b"# by hand"; found["posefree_kit/stray.py"] = b""; del found["posefree_kit/camera.py"]
        return found
    monkeypatch.setattr(agree, "files", meddled)
    said = agree.differing()
    assert {"posefree_kit/core.py: differs", "posefree_kit/stray.py: no notebook exports it", "posefree_kit/camera.py: missing"} <= set(said)

def test_readme_cells():
    assert readme.cell_md(new_markdown_cell("![x](images/a.png) [y](01_camera.ipynb) [z](https://a.b/c)")) == "![x](nbs/images/a.png) [y](nbs/01_camera.ipynb) [z](https://a.b/c)"
    assert readme.cell_md(new_code_cell("#| hide\n1")) == "" and readme.cell_md(new_code_cell('#| eval: false\nopen("../data/a")')) == '```python\nopen("data/a")\n```'
