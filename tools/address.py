"""Puts settings.ini's address (user, repo, branch) wherever the repository names itself.

    python tools/address.py [--check]

That is pyproject.toml's urls, and in the notebooks the Open-in-Colab badges, the install cells
(`git+https://...`) and plain links to the repository. README.md follows from nbs/index.ipynb
(tools/readme.py)."""

import re
import sys

from project import ROOT, notebooks, settings

name = r"[\w-][\w.-]*?"
end = r"(?=\.git\b|\.?(?![\w.-]))"  # a name may hold dots, but ends neither in one nor in .git


def rewritten(text, cfg, old):
    """`text` of a notebook with every mention of the repository brought to the address in `cfg`.

    `old` is the address until now."""
    user, repo, branch = cfg["user"], cfg["repo"], cfg["branch"]
    text = re.sub(
        rf"(colab\.research\.google\.com/github)/{name}/{name}/blob/[^/\s]+/",
        rf"\1/{user}/{repo}/blob/{branch}/",
        text,
    )
    text = re.sub(rf"(git\+https://github\.com)/{name}/{name}{end}", rf"\1/{user}/{repo}", text)
    return re.sub(rf"{re.escape(old)}{end}", f"https://github.com/{user}/{repo}", text)


def changes(root=ROOT):
    "The files that name another address than settings.ini: path to new text"
    cfg, res = settings(root), {}
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    old = re.search(r'^Repository = "(.*)"$', text, re.M)[1]
    for path in notebooks(root):
        was = path.read_text(encoding="utf-8")
        if (now := rewritten(was, cfg, old)) != was:
            res[path] = now
    now = re.sub(r'^Repository = ".*"$', f'Repository = "{cfg["git_url"]}"', text, flags=re.M)
    now = re.sub(
        r'^Changelog = ".*"$',
        f'Changelog = "{cfg["git_url"]}/blob/{cfg["branch"]}/CHANGELOG.md"',
        now,
        flags=re.M,
    )
    now = re.sub(r'^branch = ".*"$', f'branch = "{cfg["branch"]}"', now, flags=re.M)
    if now != text:
        res[project] = now
    return res


if __name__ == "__main__":
    found = changes()
    if "--check" in sys.argv:
        for path in found:
            print(
                f"{path.relative_to(ROOT)} names another address than settings.ini: run `make"
                " address`"
            )
        sys.exit(bool(found))
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
