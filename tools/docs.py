"""The documentation site in _docs/site, from the notebooks: `python tools/docs.py [--serve]`.

nbdev-proc-nbs turns each notebook into a page; `signatures` and `examples` decide how it reads.
Tutorials and the changelog are copied, `options_page` writes the options, and the pages in docs/
are written by hand. mkdocs-material builds the site, strictly: a broken link or anchor is an error.
"""

import base64
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from options_page import option_names, options_page
from project import PACKAGES, ROOT, directives, joined, lessons, settings
from readme import ansi, block
from signatures import readable

from examples import asserts, needed, python, without_tests

PROC, OUT = ROOT / "_proc", ROOT / "_docs"
SRC = OUT / "src"
GUIDES = {
    "getting-started": "Getting started",
    "colab": "Train on Colab with Drive",
    "data": "Prepare data",
    "fine-tuning": "Fine-tune (SFT, LoRA, DPO)",
    "chat-and-serve": "Chat and serve",
    "checkpoints": "Inspect and export checkpoints",
    "performance": "Performance",
    "migrating": "Migrating",
    "troubleshooting": "Troubleshooting",
}
ABOUT = {
    "commands": "Commands",
    "formats": "Formats",
    "comparison": "Comparison",
}
CHINESE = {
    "zh/index": ("首页", "docs/zh/index.md"),
    "zh/getting-started": ("快速上手", "docs/zh/getting-started.md"),
    "zh/colab": ("在 Colab 上用 Drive 训练", "docs/zh/colab.md"),
    "zh/data": ("准备数据", "docs/zh/data.md"),
    "zh/fine-tuning": ("微调（SFT、LoRA、DPO）", "docs/zh/fine-tuning.md"),
    "zh/migrating": ("迁移指南", "docs/zh/migrating.md"),
    "zh/troubleshooting": ("常见问题", "docs/zh/troubleshooting.md"),
}
WRITTEN = {
    **{g: f"docs/{g}.md" for g in (*GUIDES, *ABOUT)},
    **{page: source for page, (_, source) in CHINESE.items()},
    "index": "docs/index.md",
    "contributing": "CONTRIBUTING.md",
    "architecture": "ARCHITECTURE.md",
    "changelog": "CHANGELOG.md",
}  # by hand: page to source
SAME = {"README.md": "index", "nbs/index.ipynb": "index", "README.zh.md": "zh/index"}
OPTIONS = "options.md"
OPTIONS_SOURCE = "nbs/config/01_options.ipynb"  # for the guides, this is the page of the options
PACKAGE_TITLES = {
    "core": "files, lazy imports, tables",
    "tokenizer": "byte-level BPE, chat templates",
    "config": "options, save schedule",
    "data": "readers, corpora, token sets",
    "model": "transformer, generation, LoRA",
    "checkpoint": "save, verify, analyze, export",
    "run": "run folder, backup, metrics",
    "train": "fit and what it is made of",
    "": "chat, serve, widgets, command line",
}  # as the overview of the reference describes them
# Each sign of Chinese is a word. No stemmer: it cuts `learning_rate` in the index, and the query
# keeps it. No trimmer: it knows no letters but ours.
SEARCH = {
    "separator": r"""[\s\-.,:;()\[\]"'`=/，。：；、（）“”]+|(?=[\u3000-\u9fff])""",
    "pipeline": ["stopWordFilter"],
}
TUTORIALS = [
    "quickstart",
    "train_with_drive",
    "resume_after_disconnect",
    "prepare_and_inspect_data",
    "from_zero_to_chat",
    "sft",
    "tool_calling",
    "lora",
    "dpo",
    "diffusion",
    "inspect_checkpoints",
]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def modules():
    "Module name to notebook, in reading order"
    found = {}
    for p in lessons():
        for c in load(p)["cells"]:
            if c["cell_type"] == "code" and (
                name := directives(joined(c["source"]))[0].get("default_exp")
            ):
                found[name] = p.relative_to(ROOT / "nbs").as_posix()
    return found


def reference(module):
    "The page of a module: `train.trainer` stands at reference/train/trainer.md"
    return f"reference/{module.replace('.', '/')}.md"


def page_of(target):
    "The page for a file of nbs/ or of the root, seen from the site's root; None: it has none"
    if target.startswith("nbs/tutorials/"):
        return f"tutorials/{Path(target).stem}.md"
    if target.startswith("nbs/images/"):
        return f"images/{Path(target).name}"
    if page := SAME.get(target) or next((p for p, o in WRITTEN.items() if target == o), None):
        return f"{page}.md"
    name = next((n for n, p in MODULES.items() if target == f"nbs/{p}"), None)
    return name and reference(name)


def linked(text, source, page):
    "Markdown with the links of `source`, a path in the repository, as they must read on `page`"

    def to(link):
        symbol = re.fullmatch(r"/([\w/]+)\.html(#.*)?", link)  # of nbdev
        if symbol and (module := symbol[1].replace("/", ".")) in MODULES:
            to_page = posixpath.relpath(reference(module), posixpath.dirname(page))
            return to_page + (symbol[2] or "").lower()
        if link == "/options.html":
            return posixpath.relpath(OPTIONS, posixpath.dirname(page))
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", link):
            return link
        path, mark, rest = re.match(r"([^#?]*)([#?]?)(.*)", link, re.S).groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        to_options = target == OPTIONS_SOURCE and source.startswith("docs/")
        if found := OPTIONS if to_options else page_of(target):
            return posixpath.relpath(found, posixpath.dirname(page)) + mark + rest
        return f"{settings()['git_url']}/blob/{settings()['branch']}/{target}"

    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + to(m[2]), parts[i])
    return "".join(parts)


def is_table(text):
    "Whether a text has columns, which must not wrap"
    columns = [{m.end() for m in re.finditer(r"\S {2,}(?=\S)", l)} for l in text.splitlines()]
    return any(a & b for a, b in zip(columns, columns[1:])) or "  " in text.strip()[:1]


def text_output(text):
    "A text that a cell printed: a table scrolls sideways, other lines wrap"
    text = ansi.sub("", text).replace("__main__.", "").strip("\n")
    lines = [l.rstrip("\r").rpartition("\r")[2].rstrip() for l in text.split("\n")]
    kind = "" if is_table("\n".join(lines)) else " .wrap"
    return block("\n".join(lines), f"{{ .text .no-copy .output{kind} }}") if text else ""


def shown(o, source, page, pictures, alt=""):
    "An output as Markdown; a picture goes into `pictures`, path to bytes"
    if o["output_type"] == "stream":
        return "" if o.get("name") == "stderr" else text_output(joined(o["text"]))
    data = o.get("data", {})
    if "image/png" in data:
        name = f"{Path(page).stem}-{len(pictures) + 1}.png"
        pictures[f"{posixpath.dirname(page)}/{name}".lstrip("/")] = base64.b64decode(
            joined(data["image/png"])
        )
        return f"![{alt}]({name})"
    if "text/html" in data:
        text = re.sub(r"\n\s*\n", "\n", joined(data["text/html"]))
        return f'<div class="output">\n{text}\n</div>'
    if "text/markdown" in data:
        text = joined(data["text/markdown"]).removeprefix("---\n").strip()
        return linked(symbol(text), source, page)
    return text_output(joined(data["text/plain"])) if "text/plain" in data else ""


SYMBOL = re.compile(r"^### ((?!_)\w+)$", re.M)  # the heading of a public symbol


def symbol(text):
    "What nbdev shows of a symbol: its heading has the anchor, its signature is readable"
    text = SYMBOL.sub(lambda m: f"### {m[1]} {{ #{m[1].lower()} }}", text)
    return readable(text, option_names())


def contents(outputs):
    "The public symbols of a page with their first line, as a table; empty for one symbol"
    rows = []
    for text in outputs:
        if name := SYMBOL.search(text):
            says = re.search(r"^\*(.+?)\*$", text[name.end() :], re.M | re.S)
            says = " ".join(says[1].split()).replace("|", "\\|") if says else ""
            rows.append(f"| [`{name[1]}`](#{name[1].lower()}) | {says} |")
    return "\n".join(["| Symbol | Purpose |", "| - | - |", *rows]) if len(rows) > 1 else ""


def merged(outputs):
    "Outputs, with what was printed piece by piece as one"
    found = []
    for o in outputs:
        same = found and o["output_type"] == found[-1]["output_type"] == "stream"
        if same and o.get("name") == found[-1].get("name"):
            found[-1] = {**o, "text": joined(found[-1]["text"]) + joined(o["text"])}
        else:
            found.append(o)
    return found


def folded(cell):
    "Whether a notebook shows the cell without its code"
    facts = cell["metadata"]
    return facts.get("cellView") == "form" or facts.get("jupyter", {}).get("source_hidden")


def examples_of(cells, is_reference):
    "Code cells of a notebook to what the page shows of each: source and outputs"
    found = []
    for cell in cells:
        flags, text = directives(joined(cell["source"]))
        outputs = merged(cell.get("outputs", [])) if flags.get("output") != "false" else []
        tests = any(map(asserts, python(text) or ()))
        code = "" if flags.get("echo") == "false" else without_tests(text)
        if tests and not code or folded(cell) and (tests or is_reference):
            code, outputs = "", []
        found.append([code, outputs, flags.get("fig-alt", "")])
    if is_reference:
        for one, stays in zip(found, needed([(code, bool(outs)) for code, outs, _ in found])):
            one[0] = one[0] if stays else ""
    return found


def front(text, source):
    "nbdev's front matter as the head of a page"
    facts = yaml.safe_load(text.strip().strip("-"))
    address = f"{settings()['git_url']}/blob/{settings()['branch']}/{source}"
    note = f"*This page is the notebook [{source}]({address}), without its tests.*"
    return [f"# {facts['title']}", f"> {facts['description']}", note]


def code_cell(cell, example, source, page, pictures):
    "A code cell as Markdown parts: its code, folded where the notebook folds it, and its outputs"
    code, outputs, alt = example
    text = block(code, "python") if code else ""
    if text and folded(cell):
        name = re.match(r"#\s*@title\s+(.*)", code)
        title = html.escape(name[1].split("{")[0].strip() if name else "Code")
        text = f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n\n</details>'
    return [text, *(shown(o, source, page, pictures, alt) for o in outputs)]


def sentences(parts):
    "Parts of a page; a text that announces code which is not shown ends in a period"
    shows = ("```", "<", "|", "!", "- ", "[source]")
    for i, text in enumerate(parts):
        following = parts[i + 1] if i + 1 < len(parts) else ""
        announces = text.endswith(":") and not text.startswith(shows)
        yield text[:-1] + "." if announces and not following.startswith(shows) else text


def convert(notebook, source, page):
    "Write a page from a notebook"
    visible = []
    for cell in load(notebook)["cells"]:
        flags, text = directives(joined(cell["source"]))
        if "hide" not in flags and not text.startswith("<!-- WARNING"):
            visible.append(cell)
    is_code = lambda c: c["cell_type"] == "code"
    examples = iter(examples_of(filter(is_code, visible), page.startswith("reference/")))
    parts, pictures = [], {}
    for cell in visible:
        text = directives(joined(cell["source"]))[1]
        if cell["cell_type"] == "raw":
            parts += front(text, source)
            symbols = [o for c in filter(is_code, visible) for o in c.get("outputs", [])]
            said = [o.get("data", {}).get("text/markdown", "") for o in symbols]
            parts.append(linked(contents(map(joined, said)), source, page))
        elif is_code(cell):
            parts += code_cell(cell, next(examples), source, page, pictures)
        else:
            parts.append(linked(text, source, page).strip())
    write(page, "\n\n".join(sentences([o for o in parts if o])) + "\n")
    for name, raw in pictures.items():
        (SRC / name).write_bytes(raw)


def settle():
    "Links to symbols that show no heading of their own lead to their page"
    text = {reference(m): (SRC / reference(m)).read_text(encoding="utf-8") for m in MODULES}
    has = {page: {h.lower() for h in re.findall(r"^#+ (\w+)", t, re.M)} for page, t in text.items()}
    for page, t in text.items():

        def to(m, page=page):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), m[1]))
            return m[0] if m[2] in has.get(target, ()) else f"({m[1]})"

        write(page, re.sub(r"\(([\w./]+\.md)#([\w.]+)\)", to, t))


def write(page, text):
    (SRC / page).parent.mkdir(parents=True, exist_ok=True)
    (SRC / page).write_text(text, encoding="utf-8")


def title(path):
    return next(
        l[2:]
        for c in load(path)["cells"]
        if c["cell_type"] == "markdown"
        for l in joined(c["source"]).splitlines()
        if l.startswith("# ")
    )


def package(module):
    return module.rpartition(".")[0]


def about(notebook):
    "The first quotation of a lesson: what the module does"
    cells = load(ROOT / "nbs" / notebook)["cells"]
    text = "\n".join(joined(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.search(r"^> (.+)", text, re.M)[1]


def overview():
    "The first page of the reference: every module by package"
    parts = ["# API reference", "Every module is a notebook. Its page has the lesson and the API."]
    for o in PACKAGES:
        parts.append(f"## {o or 'minigpt'}: {PACKAGE_TITLES[o]}")
        rows = [
            f"| [`{m}`]({posixpath.relpath(reference(m), 'reference')}) | {about(notebook)} |"
            for m, notebook in MODULES.items()
            if package(m) == o
        ]
        parts.append("\n".join(["| Module | Purpose |", "| - | - |", *rows]))
    return "\n\n".join(parts) + "\n"


def navigation():
    tutorials = [(title(ROOT / f"nbs/tutorials/{t}.ipynb"), t) for t in TUTORIALS]
    packages = [
        {o or "minigpt": [{m: reference(m)} for m in MODULES if package(m) == o]} for o in PACKAGES
    ]
    return [
        {"Home": "index.md"},
        {"Guides": [{t: f"{g}.md"} for g, t in GUIDES.items()]},
        {"Tutorials": [{name: f"tutorials/{t}.md"} for name, t in tutorials]},
        {"Options": OPTIONS},
        {"API reference": [{"Overview": "reference/index.md"}, *packages]},
        {"Reference": [{t: f"{g}.md"} for g, t in ABOUT.items()]},
        {
            "Contributing": [
                {"Contributing": "contributing.md"},
                {"Architecture": "architecture.md"},
                {"Changelog": "changelog.md"},
            ]
        },
        {"中文": [{t: f"{page}.md"} for page, (t, _) in CHINESE.items()]},
    ]


def palette():
    "The scheme of the system, and a button to change it"
    return [
        {
            "media": f"(prefers-color-scheme: {s})",
            "scheme": c,
            "toggle": {"icon": f"material/weather-{i}", "name": f"Switch to the {o} scheme"},
        }
        for s, c, i, o in (
            ("light", "default", "sunny", "dark"),
            ("dark", "slate", "night", "light"),
        )
    ]


FEATURES = [
    "content.code.copy",
    "navigation.footer",
    "navigation.instant",
    "navigation.tabs",
    "navigation.top",
    "search.highlight",
    "toc.follow",
]


def configuration():
    cfg = settings()
    return {
        "site_name": "minigpt",
        "site_url": cfg["doc_host"] + cfg["doc_baseurl"] if "doc_host" in cfg else cfg["git_url"],
        "repo_url": cfg["git_url"],
        "docs_dir": "src",
        "site_dir": "site",
        "nav": navigation(),
        "strict": True,
        "plugins": [{"search": SEARCH}],
        "extra_css": ["extra.css"],
        "extra_javascript": ["https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"],
        "extra": {
            "alternate": [
                {"name": "English", "link": "./", "lang": "en"},
                {"name": "简体中文", "link": "./zh/", "lang": "zh"},
            ]
        },
        "validation": {
            "nav": {"omitted_files": "warn"},
            "links": {"not_found": "warn", "anchors": "warn", "absolute_links": "warn"},
        },
        "theme": {"name": "material", "font": False, "features": FEATURES, "palette": palette()},
        "markdown_extensions": [
            "attr_list",
            "md_in_html",
            "tables",
            "admonition",
            {"toc": {"permalink": True, "toc_depth": 3}},
            "pymdownx.superfences",
            {"pymdownx.highlight": {"use_pygments": True}},
            {"pymdownx.arithmatex": {"generic": True}},
        ],
    }


def section(source, heading, page):
    "The text under a heading of a file in the root"
    text = (ROOT / source).read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return linked(found[1].strip(), source, page)


def written(source, page):
    "A page that is written by hand; a line that is a link to a section of README becomes its text"
    text = (ROOT / source).read_text(encoding="utf-8")
    link = r"^\[(.+)\]\((?:\.\./)+(README[\w.]*)#\S+\)$"
    text = linked(re.sub(link, r"<!-- \2: \1 -->", text, flags=re.M), source, page)
    return re.sub(r"<!-- (\S+): (.+?) -->", lambda m: section(m[1], m[2], page), text)


def process_notebooks():
    "Let nbdev write each lesson with its signatures to _proc"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    command = [Path(sys.executable).parent / "nbdev-proc-nbs"]
    command += ["--skip-folder-re", r"^[_.]|tutorials", "--skip-file-re", r"^[_.]|index"]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"nbdev-proc-nbs failed:\n{done.stderr[-3000:]}")


def output_colors() -> str:
    "CSS that gives the outputs of notebooks the colors of the page's scheme."
    from minigpt.core.colors import COLORS

    def rule(scheme, theme):
        values = "".join(f"--minigpt-{k}:{v[theme]}!important;" for k, v in COLORS.items())
        return f'[data-md-color-scheme="{scheme}"] .minigpt{{{values}}}\n'

    return rule("default", 0) + rule("slate", 1)


def write_pages():
    "Write every page as Markdown to _docs/src"
    shutil.rmtree(OUT, ignore_errors=True)
    for name, notebook in MODULES.items():
        convert(PROC / notebook, f"nbs/{notebook}", reference(name))
    settle()
    write("reference/index.md", overview())
    for t in TUTORIALS:
        convert(ROOT / f"nbs/tutorials/{t}.ipynb", f"nbs/tutorials/{t}.ipynb", f"tutorials/{t}.md")
    for page, source in WRITTEN.items():
        head = "---\nhide: [navigation]\n---\n" if page == "index" else ""
        write(f"{page}.md", head + written(source, f"{page}.md"))
    write(OPTIONS, linked(options_page(), f"docs/{OPTIONS}", OPTIONS))
    style = (ROOT / "tools/docs.css").read_text(encoding="utf-8")
    write("extra.css", style + output_colors())
    shutil.copytree(ROOT / "nbs/images", SRC / "images")


def build():
    "Run mkdocs; return its exit code"
    text = json.dumps(configuration(), indent=1)  # JSON is YAML
    (OUT / "mkdocs.yml").write_text(text, encoding="utf-8")
    action = "serve" if "--serve" in sys.argv else "build"
    command = [sys.executable, "-m", "mkdocs", action, "-f", OUT / "mkdocs.yml"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=OUT, env=env).returncode


MODULES = modules()
if __name__ == "__main__":
    process_notebooks()
    write_pages()
    sys.exit(build())
