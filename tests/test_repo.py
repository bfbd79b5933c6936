"What holds for the whole repository: who imports whom, what importing costs, what the notebooks carry, what the package holds, where links lead."
import ast
import configparser
import json
import os
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from chapters import skipped
from readme import readme
from tree import ROOT, notebooks, tree_copy

MODULES = sorted(p.stem for p in (ROOT/"posefree_kit").glob("*.py") if p.stem[0] != "_")
LAZY = "plotly jupyter_core jupyter_client IPython ipykernel ipywidgets anywidget lpips open_clip facenet_pytorch torchmetrics matplotlib skimage trimesh imageio nbdev fastcore ray pyarrow pandas".split()
# The chapters in order, and what each may import itself; what those may import is allowed as well.
MAY_IMPORT = dict(
    core="", camera="core", portraits="camera", rendering="core camera", stylegan="core", generator="rendering stylegan", pose="generator",
    discriminator="stylegan camera", latent_encoder="pose", training="pose discriminator latent_encoder portraits", checkpoints="pose discriminator", features="core",
    losses="camera features pose", optimiser="losses checkpoints", photos="core features", baselines="latent_encoder optimiser",
    evaluation="training portraits baselines optimiser", viewer="optimiser evaluation", scale="optimiser evaluation", benchmark="optimiser evaluation", cli="*")

def allowed(module:str) -> set:
    "Everything a module may import, by way of others too"
    if MAY_IMPORT[module] == "*": return set(MAY_IMPORT) - {module}
    direct = set(MAY_IMPORT[module].split()) | ({"core"} - {module})
    return direct.union(*(allowed(m) for m in direct if m != "core"))

def kit_imports(source:str) -> set:
    "Modules of the kit that a source imports, at its top or inside functions"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "posefree_kit" + (f".{node.module}" if node.module else "") if node.level else node.module
            names = [base, *(f"{base}.{a.name}" for a in node.names)]
        else: continue
        found |= {n.split(".")[1] for n in names if n.startswith("posefree_kit.")}
    return found & set(MAY_IMPORT)

def markdown(nb) -> str: return "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")

def python(code:str, cwd=None, **env) -> str:
    "Run Python in a process of its own and return what it prints"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=os.environ | env)
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout

NOTEBOOKS = notebooks()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)

@pytest.mark.parametrize("module", MODULES)
def test_a_chapter_imports_only_chapters_below_it(module):
    source = (ROOT/"posefree_kit"/f"{module}.py").read_text(encoding="utf-8")
    above = kit_imports(source) - allowed(module) - {module}
    assert not above, f"{module} imports {', '.join(sorted(above))}; it may import {', '.join(sorted(allowed(module)))}"

def test_the_import_rule_can_fail():
    assert kit_imports("def f():\n    from .pose import PoseLearner") == {"pose"} and "pose" not in allowed("generator")
    assert kit_imports("import posefree_kit.cli") == {"cli"} and kit_imports("from . import camera") == {"camera"}
    order = list(MAY_IMPORT)
    assert all(order.index(m) < i for i, module in enumerate(order) for m in allowed(module))

def test_chapter_numbers_follow_the_order():
    exports = {nb: re.search(r"#\|\s*default_exp\s+(\w+)", nb.read_text(encoding="utf-8")) for nb in NOTEBOOKS}
    order = [m[1] for nb, m in exports.items() if m]
    assert order == [m for m in MAY_IMPORT if m in order] and set(order) == set(MODULES)

def test_importing_brings_in_nothing_heavy():
    assert python("import sys, posefree_kit; print('torch' in sys.modules)").strip() == "False"
    code = f"import sys, {', '.join(f'posefree_kit.{m}' for m in MODULES)}\nprint(*[m for m in {LAZY} if m in sys.modules])"
    assert python(code).split() == []

def test_version_is_one():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    version = cfg["DEFAULT"]["version"]
    assert f'__version__ = "{version}"' in (ROOT/"posefree_kit"/"__init__.py").read_text()
    assert f"## {version}" in (ROOT/"CHANGELOG.md").read_text()

def test_the_lock_pins_what_the_requirements_allow():
    "requirements-lock.txt: one version of everything, each within settings.ini, and no host to get it from"
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    lines = [line for line in (ROOT/"requirements-lock.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) and all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in lines)
    for r in (Requirement(x) for k in ("requirements", "scale_requirements", "notebooks_requirements", "dev_requirements") for x in cfg["DEFAULT"][k].split()):
        assert r.specifier.contains(pins[canonicalize_name(r.name)]), r

def test_glossary_names_are_the_names_in_the_code():
    from posefree_kit.core import GLOSSARY
    assert all(len(row) == 5 and all(row) for row in GLOSSARY)
    source = "\n".join((ROOT/"posefree_kit"/f"{m}.py").read_text(encoding="utf-8") for m in MODULES)
    used = {getattr(n, "arg", None) or getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "name", None) for n in ast.walk(ast.parse(source.replace("from __future__", "#")))}
    missing = [name for row in GLOSSARY for name in re.findall(r"[A-Za-z_]\w*", row[1]) if name not in used]
    assert not missing, f"the glossary names what no code is called: {missing}"

@each_notebook
def test_a_notebook_is_light_and_ran_well(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert path.stat().st_size < 1_000_000, f"{path.stat().st_size:,} bytes"
    assert "widgets" not in nb.metadata, "stored widget state"
    code = [c for c in nb.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"], "a stored error"
    stderr = "".join(o.get("text", "") for o in outputs if o.get("name") == "stderr")
    assert not re.search(r"Warning:|Traceback", stderr), f"a stored warning:\n{stderr[:800]}"
    if any(c.source.strip() and not skipped(c.source) for c in code): assert outputs, "no output is stored: run `make chapters`"

@each_notebook
def test_a_chapter_begins_with_a_title_and_a_line(path):
    assert re.match(r"# \S.*\n+> \S", markdown(nbformat.read(path, as_version=4))), "expected `# Title` and a one-line quote"

def code_lines(lines) -> int: return sum(bool(line.strip()) and not line.startswith("#|") for line in lines)

def test_exports_are_short():
    "House style: 12 lines at the median, for definitions; cells, which may hold a few of them, are told and bounded"
    cells, definitions = {}, {}
    for path in NOTEBOOKS:
        exported = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and re.search(r"^#\|\s*export", c.source, re.M)]
        if not exported: continue
        cells[path.stem] = [code_lines(c.splitlines()) for c in exported]
        definitions[path.stem] = [code_lines(c.splitlines()[n.lineno - 1:n.end_lineno]) for c in exported for n in ast.parse(c).body if hasattr(n, "body")]
    table = "\n".join(f"{name}: definition {statistics.median(d):g} lines at the median, {max(d)} at most; cell {statistics.median(cells[name]):g} and {max(cells[name])}"
                      for name, d in definitions.items())
    every = [n for d in definitions.values() for n in d]
    assert statistics.median(every) <= 12 and max(every) <= 90 and statistics.median(sum(cells.values(), [])) <= 24, table

def links(text:str) -> list:
    "Relative targets of links and images in Markdown"
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = re.findall(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    return [t.split("#")[0] for a, b in found for t in [a or b] if not re.match(r"[a-z]+:|#", t)]

@each_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    for target in links(markdown(nbformat.read(path, as_version=4))):
        there = (path.parent/target).resolve()
        assert there.exists(), f"{path.name}: {target} is not there"
        assert there.is_relative_to(ROOT/"nbs"), f"{path.name}: {target} is outside nbs/, so the site would not have it"

def test_readme_is_the_index_and_its_links_lead_somewhere():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert text == readme(), "run `make export`"
    found = links(text)
    assert found and not [t for t in found if not (ROOT/t).exists()]
    targets = set(re.findall(r"^(\w+):", (ROOT/"Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"make (\w+) ", text)) <= targets

def test_every_chapter_and_tutorial_is_in_the_map():
    mapped = [n for p in NOTEBOOKS if re.match(r"\d\d\w?_|tutorials/", n := p.relative_to(ROOT/"nbs").as_posix())]
    assert sorted(t for t in set(links(markdown(nbformat.read(ROOT/"nbs"/"index.ipynb", 4)))) if re.match(r"\d\d\w?_|tutorials/", t)) == mapped

def test_lab_opens_a_notebook_with_the_kernel_of_the_environment():
    recipe = (ROOT/"Makefile").read_text(encoding="utf-8").split("\nlab:")[1].split("\n\n")[0]
    there = ROOT/re.search(r"default_url=/lab/tree/(\S+)", recipe)[1]
    assert there in NOTEBOOKS and "JUPYTER_PREFER_ENV_PATH=1" in recipe
    assert nbformat.read(there, as_version=4).metadata.kernelspec.name == "python3"

def test_the_title_cell_holds_only_title_and_line():
    "nbdev makes front matter of it and drops the rest"
    for path in NOTEBOOKS:
        first = nbformat.read(path, as_version=4).cells[0].source
        assert re.fullmatch(r"# [^\n]+\n+> [^\n]+\n*", first), f"{path.name}: expected `# Title` and `> a line` alone in the first cell, got {first[:200]!r}"

def test_no_file_names_a_machine():
    "Home folders, this clone's own path, and the paths that warnings print"
    bad = re.compile("|".join([r"/(?:home|Users)/\w", "/" + "root/", re.escape(f"{ROOT}/"), "/tmp/" + "ipykernel_", "site-" + "packages/"]))
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n") if (ROOT/".git").exists() else \
        [p.relative_to(ROOT).as_posix() for folder in ("nbs", "posefree_kit", "tests", "data") for p in (ROOT/folder).rglob("*")]
    files = [n for n in files if Path(n).suffix in {".py", ".md", ".ipynb", ".json", ".jsonl", ".yml", ".toml", ".ini", ".csv", ".css", ".js", ".html", ".cpp", ".txt", ""} and (ROOT/n).is_file()]
    hits = []
    assert len(files) > 100, f"expected the files of the repository, got {files}"
    for name in files:
        text = (ROOT/name).read_text(encoding="utf-8", errors="ignore")
        if name.endswith(".ipynb"): text = re.sub(r'"(?:image/\w+|application/[^"]+)": ("|\[|\{)[^\n]*', "", text)
        hits += [f"{name}: {text[max(0, m.start() - 20):m.end() + 30]!r}" for m in bad.finditer(text)]
    assert not hits, "\n".join(hits[:10])

def test_the_wheel_carries_everything_and_works_elsewhere(tmp_path):
    with tree_copy() as copy:
        p = subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)], cwd=copy, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr[-2000:]
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT/"posefree_kit").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert expected == {n for n in wheel.namelist() if n.startswith("posefree_kit/")}
    assert "posefree = posefree_kit.cli:app" in wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    wheel.extractall(tmp_path/"site")
    code = "import json, posefree_kit; from posefree_kit.checkpoints import load_generator; g = load_generator(); print(json.dumps([posefree_kit.__file__, g.resolution]))"
    where, resolution = json.loads(python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path/"site")))
    assert where.startswith(str(tmp_path)) and resolution >= 64
