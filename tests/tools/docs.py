"Build the site into _docs/: nbdev processes the notebooks, Quarto renders them; without Quarto, nbconvert makes plain pages."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import yaml

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
    import nbformat
    from nbconvert import HTMLExporter
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_preprocessor("nbconvert.preprocessors.TagRemovePreprocessor", enabled=True)
    exporter._preprocessors[-1].remove_input_tags = {"quiet"}
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(proc, out, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    for path in sorted(proc.rglob("*.ipynb")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        for cell in raw["cells"]: cell.pop("has_sd", None) # nbdev's own mark
        nb = nbformat.reads(json.dumps(raw), as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "raw" and cell.source.startswith("---"): # front matter
                said = yaml.safe_load(cell.source.strip("-\n"))
                cell.update(cell_type="markdown", source=f"# {said.get('title', '')}\n\n> {said.get('description', '')}")
            if re.search(r"^#\|\s*echo:\s*false", cell.source, re.M): cell.metadata["tags"] = ["quiet"]
            if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        html, _ = exporter.from_notebook_node(nb)
        page = out/path.relative_to(proc).with_suffix(".html")
        page.write_text(re.sub(r'(href="(?!\w+:)[^"#]*)\.ipynb', r"\1.html", html), encoding="utf-8")

if __name__ == "__main__":
    if shutil.which("quarto"):
        process(ROOT)
        subprocess.run([Path(sys.executable).parent/"nbdev_docs"], check=True)
    else:
        plain(process(ROOT), ROOT/"_docs")
        print("Quarto is not installed: these are plain pages (with it, the site has a sidebar and a search)")
    print("open _docs/index.html")
