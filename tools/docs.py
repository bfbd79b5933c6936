"Build the site into _docs/: nbdev processes the notebooks, Quarto renders them; without Quarto, nbconvert makes plain pages."
import os, re, shutil, subprocess, sys
from pathlib import Path

from tree import ROOT

def process(
    root:Path, # top of a tree; its _proc/ is made anew
) -> Path: # the folder of processed notebooks
    "What nbdev does before Quarto runs, without its attempts to install Quarto"
    os.chdir(root)
    import nbdev.doclinks, nbdev.quarto, nbdev.serve, plotly
    shutil.copy(Path(plotly.__file__).parent/"package_data"/"plotly.min.js", root/"nbs")
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    return nbdev.serve.proc_nbs(force=True, n_workers=0)

def plain(proc:Path, out:Path):
    "Pages by nbconvert: every notebook, its pictures beside it, links between them kept"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(proc, out, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    for nb in sorted(proc.rglob("*.ipynb")):
        folder = out/nb.parent.relative_to(proc)
        subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR", "--output-dir", folder, nb], check=True)
        page = folder/f"{nb.stem}.html"
        page.write_text(re.sub(r'(href="(?!\w+:)[^"#]*)\.ipynb', r"\1.html", page.read_text(encoding="utf-8")), encoding="utf-8")

if __name__ == "__main__":
    if shutil.which("quarto"):
        process(ROOT)
        subprocess.run([Path(sys.executable).parent/"nbdev_docs"], check=True)
    else:
        plain(process(ROOT), ROOT/"_docs")
        print("Quarto is not installed: these are plain pages (with it, the site has a sidebar and a search)")
    print("open _docs/index.html")
