"""Write README.md from nbs/index.ipynb, without Quarto: `python tools/readme.py [--check]`.

Markdown cells are copied, with links relative to the root. Code cells become code blocks, followed
by their stored outputs: text as a block, pictures as files in nbs/images/. `#| hide` drops a cell,
`#| echo: false` its code, `#| output: false` its outputs. `#| fig-alt:` describes pictures.
"""

import base64
import json
import posixpath
import re
import sys

from project import ROOT, directives, joined

head = "<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n"
ansi = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def from_root(link):
    "Return a link of nbs/index.ipynb relative to the root."
    if re.match(r"[a-z][a-z0-9+.-]*:|#|/", link):
        return link
    path, mark, rest = re.match(r"([^#?]*)([#?]?)(.*)", link, re.S).groups()
    return posixpath.normpath(posixpath.join("nbs", path)) + mark + rest


def relinked(text):
    "Return Markdown with links relative to the root; code is unchanged."
    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        p = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + from_root(m[2]), parts[i])
        p = re.sub(r"((?:src|href)=\")([^\"]+)", lambda m: m[1] + from_root(m[2]), p)
        parts[i] = re.sub(r"(?m)^(\[[^\]]+\]:\s*)(\S+)", lambda m: m[1] + from_root(m[2]), p)
    return "".join(parts)


def block(text, lang=""):
    "Return a fenced block whose fence is longer than any inside."
    fence = "`" * max([3] + [len(o) + 1 for o in re.findall(r"^`{3,}", text, re.M)])
    return f"{fence}{lang}\n{text}\n{fence}"


def output(o, pictures, alt=""):
    "Return a stored output as Markdown; add pictures to `pictures`, name → bytes."
    if o["output_type"] == "stream":
        return (
            "" if o.get("name") == "stderr" else block(ansi.sub("", joined(o["text"])).strip("\n"))
        )
    data = o.get("data", {})
    for kind, ext in [("image/svg+xml", "svg"), ("image/png", "png"), ("image/jpeg", "jpg")]:
        if kind in data:
            name = f"nbs/images/index-{len(pictures) + 1}.{ext}"
            raw = joined(data[kind])
            pictures[name] = raw.encode() if ext == "svg" else base64.b64decode(raw)
            return f"![{alt}]({name})"
    if "text/markdown" in data:
        return relinked(joined(data["text/markdown"])).strip()
    if "text/plain" in data:
        return block(ansi.sub("", joined(data["text/plain"])).strip("\n"))
    return ""


def render(nb):
    "Return the text of README.md and its pictures: name → bytes."
    parts, pictures = [], {}
    for cell in nb["cells"]:
        flags, source = directives(joined(cell["source"]))
        if cell["cell_type"] == "raw" or "hide" in flags:
            continue
        if cell["cell_type"] == "markdown":
            parts.append(relinked(source).strip())
        else:
            if flags.get("echo", "") != "false" and source:
                parts.append(block(source, "python"))
            if flags.get("output", "") != "false":
                alt = flags.get("fig-alt", "")
                parts += [output(o, pictures, alt) for o in cell.get("outputs", [])]
    return head + "\n" + "\n\n".join(o for o in parts if o) + "\n", pictures


def expected_files(root=ROOT):
    "Return the files of nbs/index.ipynb: path → bytes; None if there is no index."
    index = root / "nbs" / "index.ipynb"
    if not index.exists():
        return {}
    text, pictures = render(json.loads(index.read_text(encoding="utf-8")))
    return {
        root / "README.md": text.encode(),
        **{root / name: raw for name, raw in pictures.items()},
    }


def stale(root=ROOT):
    return [p for p, raw in expected_files(root).items() if not p.exists() or p.read_bytes() != raw]


if __name__ == "__main__":
    found = stale()
    if "--check" in sys.argv:
        for path in found:
            print(f"{path.relative_to(ROOT)} is stale: run `make readme`")
        sys.exit(bool(found))
    files = expected_files()
    for path in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
        print(f"wrote {path.relative_to(ROOT)}")
    for path in (ROOT / "nbs" / "images").glob("index-*.*"):
        if path not in files:
            path.unlink()
