"Do library and notebooks agree? Export and clean a copy of the tree, and name every file that would change."
import os, sys
from pathlib import Path

os.environ.pop("IN_TEST", None) # nbdev exports nothing under it
from readme import readme  # noqa: E402
from tree import ROOT, private_jupyter, tree_copy  # noqa: E402

def files(root:Path) -> dict: # relative path -> bytes
    "Modules and notebooks of a tree"
    found = [*(root/"posefree_kit").rglob("*.py"), *(root/"nbs").rglob("*.ipynb")]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found if ".ipynb_checkpoints" not in p.parts}

def differing() -> list: # sentences, one a file
    "Compare the tree with a fresh export of its own notebooks"
    before = files(ROOT)
    with tree_copy() as copy:
        private_jupyter(copy.parent)
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export
        for module in (copy/"posefree_kit").rglob("*.py"):
            if module.name != "__init__.py": module.unlink()
        nbdev_export.__wrapped__()
        nbdev_clean.__wrapped__()
        after = files(copy)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    why = lambda name: "no notebook exports it" if name not in after else "missing" if name not in before else "differs"
    bad = [f"{name}: {why(name)}" for name in names]
    if (ROOT/"README.md").read_text(encoding="utf-8") != readme(): bad.append("README.md: differs from nbs/index.ipynb")
    return bad

if __name__ == "__main__":
    bad = differing()
    print("\n".join(bad + ["library and notebooks disagree: run `make export` and look at `git diff`"]) if bad else "library and notebooks agree")
    sys.exit(1 if bad else 0)
