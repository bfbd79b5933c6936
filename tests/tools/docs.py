"Build the site into _docs/: nbdev processes the notebooks, Quarto renders them; without Quarto, pandoc and the template in site/ do. Both read _quarto.yml."
import ast, base64, functools, html, importlib, inspect, itertools, json, os, re, shutil, subprocess, sys, textwrap
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tree import ROOT

SITE = Path(__file__).parent/"site" # page.html, site.css, site.js
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"} # svg stays in the page
ANSI = re.compile(r"\x1b\[[0-9;]*m")

@dataclass
class Page:
    source:str # the notebook, seen from nbs/
    part:str # of the sidebar; "" for the front page
    title:str = ""
    description:str = ""
    lead:str = "" # the description as HTML
    href:str = "" # the page, seen from the site's top
    body:str = "" # HTML
    headings:list = field(default_factory=list) # (level, id, text)

    @property
    def up(self) -> str: return "../" * self.href.count("/") # from the page to the site's top
    @property
    def label(self) -> str: return (m[1] + " " if (m := re.match(r"(\d\d)_", self.source)) else "") + self.title # as the sidebar calls it

def process(
    root:Path, # top of a tree; its _proc/ is made anew
) -> Path: # the folder of processed notebooks
    "What nbdev does before Quarto runs, without its attempts to install Quarto"
    os.chdir(root)
    import nbdev.doclinks, nbdev.quarto, nbdev.serve, plotly
    for folder in ("nbs", "nbs/tutorials"): shutil.copy(Path(plotly.__file__).parent/"package_data"/"plotly.min.js", root/folder) # beside every page
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    return nbdev.serve.proc_nbs(force=True, n_workers=0)

def sidebar(config:dict) -> list: # of `Page`s, in order
    "What the site lists, as _quarto.yml says"
    def pages(entries, part):
        for e in entries:
            if isinstance(e, str): yield Page(e, part)
            else: yield from pages(e["contents"], e["section"])
    return list(pages(config["website"]["sidebar"]["contents"], ""))

@functools.cache
def module(name:str) -> dict: # name -> its definition, as ast
    "The classes and functions of a module of the kit"
    path = ROOT/"posefree_kit"/f"{name}.py"
    return {n.name: n for n in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(n, "name")}

def parameters(node) -> list: # (name with its stars, type, default), as the source says them
    "What a function takes, or a dataclass holds"
    text = lambda n: ast.unparse(n) if n is not None else ""
    def row(name, kind, default=None): # Annotated[Path, typer.Option(help="...")] is a Path
        if isinstance(kind, ast.Subscript) and text(kind.value) == "Annotated": kind = kind.slice.elts[0]
        return name, text(kind), text(default)
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        return parameters(init)[1:] if init else [row(n.target.id, n.annotation, n.value) for n in node.body if isinstance(n, ast.AnnAssign)]
    a = node.args
    plain = a.posonlyargs + a.args
    rows = [row(p.arg, p.annotation, d) for p, d in zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults)]
    rows += [row(f"*{a.vararg.arg}", a.vararg.annotation)] if a.vararg else [("*", "", "")] if a.kwonlyargs else []
    rows += [row(p.arg, p.annotation, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return rows + ([row(f"**{a.kwarg.arg}", a.kwarg.annotation)] if a.kwarg else [])

def docmented(where:str, name:str, names) -> dict: # parameter, or "return" -> what is said of it
    "docments of a definition, or the help of a command's option; a comment on a line of its own may name its parameter (`x: (B, 3)`)"
    from fastcore.docments import docments
    obj = getattr(importlib.import_module(f"posefree_kit.{where}"), name)
    said = {k: note.help for k, a in inspect.get_annotations(obj).items() for note in getattr(a, "__metadata__", ()) if getattr(note, "help", None)}
    said |= {k: v for k, v in docments(obj).items() if v}
    for key, text in list(said.items()):
        if (m := re.match(r"(\w+): ", text)) and m[1] in names and m[1] not in said: said[m[1]] = said.pop(key)[m.end():]
    return said

def fenced(text:str, kind:str) -> str: return f"````````{kind}\n{text}\n````````" # in pandoc's Markdown
def raw(html:str) -> str: return fenced(html, "{=html}")

def entry(
    name:str, # of a function or class
    where:str, # its module
) -> str: # Markdown
    "A definition as the reference shows it: the call, its docstring, a table from its docments, its source"
    from nbdev.doclinks import NbdevLookup
    node, lines = module(where)[name], (ROOT/"posefree_kit"/f"{where}.py").read_text(encoding="utf-8").splitlines()
    source = "\n".join(lines[min(n.lineno for n in (node, *node.decorator_list)) - 1:node.end_lineno])
    rows, result = parameters(node), ast.unparse(node.returns) if getattr(node, "returns", None) else ""
    said = docmented(where, name, {n for n, _, _ in rows})
    args = ", ".join(n + (f"={d}" if d else "") for n, _, d in rows)
    call = f"{name}({args})" if len(name + args + result) < 68 else f"{name}(\n{textwrap.indent(textwrap.fill(args, 68, break_long_words=False), '    ')})"
    if isinstance(node, ast.ClassDef) and not rows: call = f"class {name}({', '.join(map(ast.unparse, node.bases))})"
    code = lambda s: f"<code>{html.escape(s)}</code>" if s else ""
    table = [(code(n), code(t), code(d), ticked(said.get(n.strip("*"), ""))) for n, t, d in rows if t or d or n.strip("*") in said]
    if "return" in said: table.append(("<em>returns</em>", code(result), "", ticked(said["return"])))
    head = ("field" if isinstance(node, ast.ClassDef) else "parameter", "type", "default", "meaning, shape, unit")
    tr = lambda cells, tag="td": "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
    shown = raw(f'<div class="wide"><table class="parameters">{tr(head, "th")}{"".join(map(tr, table))}</table></div>') if any(r[3] for r in table) else ""
    inside = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"] if isinstance(node, ast.ClassDef) else []
    methods = ", ".join(f'<code id="{name.lower()}.{n.name.lower()}">{n.name}({", ".join(p[0] for p in parameters(n) if p[0] not in ("self", "cls"))})</code>' for n in inside)
    return "\n\n".join(filter(None, [
        f"::: entry\n### `{name}`", fenced(call + (f" -> {result}" if result else ""), "python"), NbdevLookup().linkify(ast.get_docstring(node) or ""),
        shown, raw(f'<p class="methods">methods: {methods}</p>') if methods else "", raw(f'<details class="source"><summary>source: {where}.py, line {node.lineno}</summary>'), fenced(source, "python"), raw("</details>"), ":::"]))

def ticked(text:str) -> str: return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)) # the little Markdown of a comment, as HTML

def picture(data:str, kind:str, path:Path, alt:str) -> str: # data: base64; -> HTML
    "Write a picture beside the page"
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(base64.b64decode(data))
    width, height = Image.open(path).size
    return f'<img src="FIGURES/{path.name}" width="{width}" height="{height}" alt="{html.escape(alt)}" loading="lazy">'

def shown(output, name, alt:str) -> str: # Markdown
    "One output of a cell, in the richest form that a page can hold"
    plain = lambda s, kind="output": f'<pre class="{kind}">{html.escape(ANSI.sub("", s).rstrip())}</pre>'
    if output.output_type == "stream": return raw(plain(output.text, "output error" if output.name == "stderr" else "output"))
    data = output.get("data", {})
    for kind in PICTURES:
        if kind in data: return raw(picture(data[kind], kind, name(PICTURES[kind]), alt))
    if "image/svg+xml" in data or "text/html" in data: return raw('<div class="wide html">' + data.get("text/html", data.get("image/svg+xml")) + "</div>")
    return data["text/markdown"] if "text/markdown" in data else raw(plain(data.get("text/plain", "")))

def markdown(
    nb, # a processed notebook
    page:Page, # gets its title, description and name
    figures:Path, # the folder for its pictures
) -> str:
    "A processed notebook in pandoc's Markdown, which is Quarto's"
    said = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
    page.title, page.description = said["title"], said.get("description", "")
    page.lead = ticked(page.description)
    page.href = str(Path(page.source).with_name(said.get("output-file", Path(page.source).stem + ".html")).as_posix())
    exports = re.search(r"#\|\s*default_exp\s+(\w+)", (ROOT/"nbs"/page.source).read_text(encoding="utf-8"))
    blocks, entries, heading = [], [], page.title
    number = iter(range(1, 1000))
    name = lambda suffix: figures/f"{Path(page.href).stem}-{next(number)}.{suffix}"
    def flush(): # nbdev puts the definitions of a cell in reverse
        if entries: blocks.extend(entry(n, exports[1]) for n in sorted(entries, key=lambda n: module(exports[1])[n].lineno)); entries.clear()
    for cell in nb.cells[1:]:
        if m := re.search(r"^show_doc\((\w+)\)", cell.source, re.M): entries.append(m[1]); continue
        flush()
        if cell.cell_type == "markdown":
            blocks.append(cell.source)
            heading = ([heading] + re.findall(r"^#+ (.+)$", cell.source, re.M))[-1]
        elif cell.cell_type == "code":
            source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            if source and not re.search(r"^#\|\s*echo:\s*false", cell.source, re.M): blocks.append(fenced(source, "python"))
            blocks += [shown(o, name, f"{page.title}: {heading}") for o in cell.outputs]
    flush()
    return "\n\n".join(blocks)

def notebook(path:Path):
    "A processed notebook, without nbdev's own mark that nbformat does not know"
    import nbformat
    raw = json.loads(path.read_text(encoding="utf-8"))
    for cell in raw["cells"]: cell.pop("has_sd", None)
    nb = nbformat.reads(json.dumps(raw), as_version=4)
    for cell in nb.cells: # what was printed in one go was stored as it came
        if cell.cell_type != "code": continue
        for before, after in itertools.pairwise(list(cell.outputs)):
            if after.get("name") and after.get("name") == before.get("name"): after.text = before.text + after.text; cell.outputs.remove(before)
    return nb

def linked(body:str, page:Page, hrefs:dict) -> str: # hrefs: notebook -> page, both from the site's top
    "Links to notebooks, to the site's top and to pictures, seen from this page"
    def place(m):
        target, mark, anchor = m[2].partition("#")
        there = target.lstrip("/") if target.startswith("/") else os.path.normpath(os.path.join(os.path.dirname(page.href), target)).replace(os.sep, "/")
        if re.match(r"\w+:|//", m[2]) or not target or there not in hrefs and not target.startswith("/"): return m[0]
        return f'{m[1]}="{page.up}{hrefs.get(there, there)}{mark}{anchor}"'
    body = re.sub(r'\b(href)="([^"]*)"', place, body)
    body = re.sub(r'<a href="#cb\d+-\d+"[^>]*></a>|(?<=<span) id="cb\d+-\d+"', "", body) # pandoc's anchor at every line of code
    body = re.sub(r'<a href="[^"]*#_[^"]*">(.*?)</a>', r"\1", body) # nbdev links private names too, which have no entry
    return body.replace('"FIGURES/', f'"{page.up}figures/')

def plain(proc:Path, out:Path):
    "The site by pandoc and the template: sidebar, contents, search, light and dark; equations as MathML; nothing from the network"
    import jinja2, pypandoc
    config = {**yaml.safe_load((proc/"nbdev.yml").read_text(encoding="utf-8"))["website"], **yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]}
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(proc, out, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    for name in ("site.css", "site.js"): shutil.copy(SITE/name, out)
    pages = sidebar({"website": config})
    for page in pages:
        text = markdown(notebook(proc/page.source), page, out/"figures")
        page.body = pypandoc.convert_text(text, "html5", format="markdown-implicit_figures+lists_without_preceding_blankline", extra_args=["--mathml", "--wrap=none"])
    hrefs = {p.source: p.href for p in pages}
    parts = [(part, list(group)) for part, group in itertools.groupby(pages, lambda p: p.part)]
    template = jinja2.Environment(loader=jinja2.FileSystemLoader(SITE), autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template("page.html")
    for i, page in enumerate(pages):
        page.body = linked(page.body, page, hrefs)
        bare = lambda h: html.unescape(re.sub(r"<annotation.*?</annotation>|<[^>]+>", "", h))
        found = re.findall(r'(?:<section id="([^"]+)"[^>]*>\s*)?<h([23])(?: id="([^"]+)")?[^>]*>(.*?)</h\2>', page.body, re.S)
        page.headings = [(int(level), outer or own, bare(text)) for outer, level, own, text in found]
        around = dict(before=pages[i - 1] if i else None, after=pages[i + 1] if i + 1 < len(pages) else None)
        path = out/page.href; path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.render(page=page, parts=parts, config=config, **around), encoding="utf-8")
    index = [dict(href=p.href, title=p.label, about=p.description, headings=[(a, t) for _, a, t in p.headings]) for p in pages]
    (out/"search.js").write_text(f"const INDEX = {json.dumps(index, ensure_ascii=False)};\n", encoding="utf-8")

if __name__ == "__main__":
    if shutil.which("quarto") and "--plain" not in sys.argv:
        process(ROOT)
        subprocess.run([Path(sys.executable).parent/"nbdev_docs"], check=True)
    else: plain(process(ROOT), ROOT/"_docs")
    print("open _docs/index.html")
