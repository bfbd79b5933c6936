"Write README.md from nbs/index.ipynb: its text, code and printed results, with links that resolve from the top folder."
import argparse, json, re, sys
from tree import ROOT

def top(text:str) -> str:
    "Links and paths seen from nbs/ -> seen from the top folder"
    text = re.sub(r"(\]\(|src=\")(?![a-z]+:|#|/|\.\./)", r"\1nbs/", text)
    return re.sub(r"(\]\(|src=\"|[\"'])\.\./", r"\1", text)

def cell_md(cell:dict) -> str:
    "One cell as Markdown"
    source = "".join(cell["source"]).strip()
    directives = re.findall(r"^#\|\s*(.+)$", source, re.M)
    if cell["cell_type"] == "markdown": return top(source)
    if cell["cell_type"] != "code" or {"hide", "echo: false"} & set(directives): return ""
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    printed = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell.get("outputs", []) if o.get("name") != "stderr")
    return f"```python\n{top(code)}\n```" + (f"\n\n```text\n{printed.strip()}\n```" if printed.strip() else "")

def readme() -> str: # the text of README.md
    "The README that nbs/index.ipynb makes"
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "<!-- Written by tests/tools/readme.py from nbs/index.ipynb: edit that. -->\n\n" + "\n\n".join(filter(None, map(cell_md, cells))).replace("\n```\n\n```python\n", "\n\n") + "\n"

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    args, path, text = ap.parse_args(), ROOT/"README.md", readme()
    if not args.check: path.write_text(text, encoding="utf-8")
    same = path.exists() and path.read_text(encoding="utf-8") == text
    if not same: print("README.md differs from nbs/index.ipynb: run `make export`")
    return 0 if same else 1

if __name__ == "__main__": sys.exit(main())
