"The site without Quarto: built once, every link followed, every page opened in Chromium at two widths with the network off."
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml

import docs
from tree import ROOT, notebooks, tree_copy

pytestmark = pytest.mark.xdist_group("site") # one worker, so that it is built once

def run(command, cwd) -> str: # what it printed
    p = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(cwd)))
    assert p.returncode == 0, (p.stdout + p.stderr)[-3000:]
    return p.stdout + p.stderr

@pytest.fixture(scope="session")
def built():
    "A copy of the tree with its site in _docs/"
    with tree_copy() as copy:
        run([sys.executable, "tests/tools/docs.py", "--plain"], copy)
        yield copy

class Seen(HTMLParser):
    "What a page has and what it leads to"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        self.loads += [attrs[k] for k in (("src", "poster") + (("href",) if tag == "link" else ())) if k in attrs and not attrs[k].startswith("data:")]

def broken(folder:Path) -> list: # sentences
    "Links, pictures, scripts and anchors of a site that lead nowhere; anything that a page would load from elsewhere"
    folder = folder.resolve()
    pages, bad = {p: Seen(p) for p in sorted(folder.rglob("*.html"))}, []
    for path, page in pages.items():
        for target in page.links + page.loads:
            url, name = urllib.parse.urlparse(target), path.relative_to(folder).as_posix()
            if url.scheme or url.netloc:
                if target in page.loads: bad.append(f"{name} loads {target}")
                continue
            there = (path.parent/urllib.parse.unquote(url.path)).resolve() if url.path else path
            if there.is_dir(): there = there/"index.html"
            if not there.is_relative_to(folder) or not there.is_file(): bad.append(f"{name} leads to {target}, which is not there")
            elif url.fragment and url.fragment not in pages.get(there, page).ids: bad.append(f"{name} leads to {target}: no such anchor")
    return bad

def test_broken_links_are_found(tmp_path):
    (tmp_path/"a.html").write_text('<a href="b.html#x">1</a><a href="#here">2</a><p id="here"><img src="no.png"><script src="https://a.b/c.js"></script><a href="https://a.b">3</a>')
    (tmp_path/"b.html").write_text('<a href="../out.html">1</a><a href="a.html#here">2</a>')
    assert broken(tmp_path) == ["a.html leads to b.html#x: no such anchor", "a.html leads to no.png, which is not there", "a.html loads https://a.b/c.js",
                                "b.html leads to ../out.html, which is not there"]

def test_the_sidebar_has_three_parts_and_every_notebook():
    pages = docs.sidebar(yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8")))
    parts = {part: [p.source for p in pages if p.part == part] for part in dict.fromkeys(p.part for p in pages)}
    assert list(parts) == ["", "Chapters", "Tutorials", "Reference"] and parts[""] == ["index.ipynb"]
    names = [p.relative_to(ROOT/"nbs").as_posix() for p in notebooks()]
    assert parts["Chapters"] == [n for n in names if re.match(r"\d\d\w?_", n)], "chapters in their order"
    assert sorted(parts["Tutorials"]) == [n for n in names if n.startswith("tutorials/")]
    assert sorted(sum(parts.values(), [])) == sorted(names)

def test_notebooks_are_processed_for_quarto(built):
    assert (built/"_proc/_quarto.yml").read_text() == (ROOT/"nbs/_quarto.yml").read_text() and (built/"nbs/nbdev.yml").exists() and (built/"_proc/plotly.min.js").exists()
    for path in notebooks():
        nb = docs.notebook(built/"_proc"/path.relative_to(ROOT/"nbs"))
        said = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
        assert said["title"] and said["description"], f"{path.name}: expected a title and a line in the front matter"
        exports = [c.source for c in nbformat.read(path, as_version=4).cells if re.search(r"^#\|\s*export\b", c.source, re.M)]
        assert any("show_doc" in c.source for c in nb.cells) == any(re.search(r"^(def|class) [^_]", e, re.M) for e in exports), f"{path.name}: definitions are documented"
    quarto = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert quarto["search"] and (ROOT/"nbs"/quarto["open-graph"]["image"]).is_file() and (ROOT/"nbs"/quarto["twitter-card"]["image"]).is_file()

def test_every_link_picture_and_anchor_resolves(built):
    site = built/"_docs"
    assert len(list(site.rglob("*.html"))) == len(notebooks())
    bad = broken(site)
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad[:20])

def test_pages_say_what_the_notebooks_say(built):
    camera, reference = ((built/"_docs"/name).read_text(encoding="utf-8") for name in ("camera.html", "reference.html"))
    row = next(r for r in re.findall(r"<tr>.*?</tr>", camera) if "<code>yaw</code>" in r)
    assert "<code>Tensor</code>" in row and "(B,) radians" in row                               # shapes and units from the docments
    assert camera.index('id="turn"') < camera.index('id="mirror"') < camera.index('id="cam2world"')      # in the source's order
    assert "<math" in camera and "$$" not in re.sub(r"<annotation.*?</annotation>|<pre.*?</pre>|<code.*?</code>", "", camera, flags=re.S)
    assert 'property="og:image"' in camera and 'rel="prev"' in camera and 'rel="next"' in camera
    import importlib
    for name in docs_modules():
        module = importlib.import_module(f"posefree_kit.{name}")
        missing = [n for n in module.__all__ if callable(getattr(module, n)) and getattr(module, n).__module__ == module.__name__ and f">{n}</a>" not in reference]
        assert not missing, f"the reference lacks {missing} of {name}"

def docs_modules() -> list: return sorted(p.stem for p in (ROOT/"posefree_kit").glob("*.py") if p.stem[0] != "_")

WIDE = """() => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre, .wide, table, p:has(> math)'))
    .slice(0, 3).map(e => e.outerHTML.slice(0, 90))"""

def test_every_page_opens_offline_at_two_widths(built, chromium):
    site, bad = built/"_docs", []
    context = chromium.new_context(viewport=dict(width=1280, height=900), offline=True)
    page = context.new_page()
    page.on("console", lambda m: bad.append(f"{page.url}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: bad.append(f"{page.url}: {e}"))
    page.on("requestfailed", lambda r: bad.append(f"{page.url}: {r.url[:120]} failed"))
    page.on("request", lambda r: bad.append(f"{page.url}: asks for {r.url[:120]}") if not r.url.startswith(("file:", "data:", "blob:")) else None)
    for path in sorted(site.rglob("*.html")):
        page.set_viewport_size(dict(width=1280, height=900))
        page.goto(path.as_uri())
        page.evaluate("() => Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0); }))")
        blank = page.evaluate("() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 90))")
        if blank: bad.append(f"{path.name}: no picture in {blank}")
        if page.locator("#sidebar a[aria-current]").count() != 1: bad.append(f"{path.name}: not in its own sidebar")
        for width in (1280, 390):
            page.set_viewport_size(dict(width=width, height=900))
            over = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
            if over > 0: bad.append(f"{path.name}: {over} pixels too wide at {width}: {page.evaluate(WIDE)}")
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad[:20])

def test_the_site_is_used(built, chromium):
    page = chromium.new_context(viewport=dict(width=1280, height=900), offline=True, color_scheme="light").new_page()
    page.goto((built/"_docs/viewer.html").as_uri())
    plot = page.locator(".js-plotly-plot").first                                                # plotly, from the file beside the pages
    plot.locator("canvas, .main-svg").first.wait_for()
    paper = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = paper(); page.click("#theme"); assert paper() != light
    page.goto((built/"_docs/tutorials/your_own_photo.html").as_uri()); assert paper() != light  # remembered
    page.keyboard.press("/"); page.keyboard.type("camera_pos"); page.keyboard.press("Enter")
    page.wait_for_url("**/camera.html#camera_position")
    assert page.locator("#camera_position").is_visible()
    page.set_viewport_size(dict(width=390, height=800)); assert not page.locator("#sidebar").is_visible()
    page.click("#menu"); page.locator("#sidebar a", has_text="Rendering").click(); page.wait_for_url("**/rendering.html")
    page.locator("a[rel=prev]").click(); page.wait_for_url("**/portraits.html")

def test_quarto_renders_it_without_a_broken_link():
    if not shutil.which("quarto"): pytest.skip("Quarto is not on the PATH: only the plain site is tested")
    with tree_copy() as copy:
        said = run([Path(sys.executable).parent/"nbdev_docs"], copy)
        assert not re.search(r"WARN|Unable to resolve", said), said[-3000:]
        bad = [b for b in broken(copy/"_docs") if not b.endswith("no such anchor")] # nbdev links methods and private names, which it gives no entry
        assert not bad, "\n".join(bad[:20])
