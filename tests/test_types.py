"Types: what is annotated agrees, and every public function says what it takes and gives."
import ast
import importlib
import subprocess
import sys

import pytest

from tree import ROOT

MODULES = sorted(p.stem for p in (ROOT/"posefree_kit").glob("*.py") if p.stem[0] != "_")

def told(lines:list, first:int, last:int) -> bool: return any("#" in line for line in lines[first - 1:last]) # a comment on these lines (counted from 1)

def own(f): # the nodes of a function, without those of functions inside it
    for n in ast.iter_child_nodes(f):
        if not isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): yield n; yield from own(n)

def gaps(source:str, public:set) -> list: # sentences
    "Parameters without a type, a default or a comment of their own, and results without a type or a comment"
    lines, found = source.splitlines(), []
    for f in ast.parse(source).body:
        if not isinstance(f, ast.FunctionDef) or f.name not in public: continue
        a, start = f.args, max([f.lineno, *(x.lineno for x in ast.walk(f.args) if hasattr(x, "lineno"))])
        head = (f.lineno, f.body[0].lineno - (f.body[0].lineno > start))
        with_default = {x.arg for x in (*(a.posonlyargs + a.args)[-len(a.defaults):], *(x for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None))} if a.defaults or a.kwonlyargs else set()
        for x in a.posonlyargs + a.args + a.kwonlyargs:
            if not x.annotation and x.arg not in with_default and not told(lines, x.lineno, x.end_lineno): found.append(f"{f.name}({x.arg})")
        gives = any(isinstance(n, (ast.Return, ast.Yield)) and n.value is not None for n in own(f))
        if gives and not f.returns and not told(lines, start, head[1]): found.append(f"{f.name} ->")
    return found

@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_says_what_it_takes_and_gives(module):
    source = (ROOT/"posefree_kit"/f"{module}.py").read_text(encoding="utf-8")
    assert not gaps(source, set(importlib.import_module(f"posefree_kit.{module}").__all__))

def test_the_rule_of_types_can_fail():
    assert gaps("def f(a, b:int, c=1): return a", {"f"}) == ["f(a)", "f ->"] and not gaps("def f(a, b): return a", {"g"})
    assert not gaps("def f(\n    a, # a number\n) -> int: return a", {"f"}) and not gaps("def f(a): return a # the same", {"f"}) and not gaps("def f(a:int): a += 1", {"f"})

def check(*what) -> tuple: # exit code, text
    p = subprocess.run([sys.executable, "-m", "mypy", "--config-file", ROOT/".mypy.ini", *what], cwd=ROOT, capture_output=True, text=True)
    return p.returncode, p.stdout + p.stderr

def test_types_agree(tmp_path):
    bad = tmp_path/"bad.py"
    bad.write_text("from posefree_kit.camera import Pose, mirror\ndef f(pose:Pose) -> Pose: return mirror(pose.yaw)\n")
    rc, text = check("posefree_kit", bad)
    found = [line for line in text.splitlines() if ": error:" in line]
    assert rc == 1 and len(found) == 1 and 'expected "Pose"' in found[0], text
