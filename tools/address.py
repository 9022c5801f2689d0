"""Update the address of the repository (user, repo, branch in settings.ini) in all files.

    python tools/address.py [--check]

The files are pyproject.toml (urls) and the notebooks: Open-in-Colab badges, install cells
(`git+https://...`) and links to the repository. README.md follows from nbs/index.ipynb
(tools/readme.py).
"""

import re
import sys

from project import ROOT, notebooks, settings

name = r"[\w-][\w.-]*?"
end = r"(?=\.git\b|\.?(?![\w.-]))"  # a name may contain dots, but does not end in one or in .git


def rewrite(text, cfg, old):
    """Return `text` of a notebook with every address replaced by the one in `cfg`.

    `old` is the previous address.
    """
    user, repo, branch = cfg["user"], cfg["repo"], cfg["branch"]
    text = re.sub(
        rf"(colab\.research\.google\.com/github)/{name}/{name}/blob/[^/\s]+/",
        rf"\1/{user}/{repo}/blob/{branch}/",
        text,
    )
    text = re.sub(rf"(git\+https://github\.com)/{name}/{name}{end}", rf"\1/{user}/{repo}", text)
    return re.sub(rf"{re.escape(old)}{end}", f"https://github.com/{user}/{repo}", text)


def changed_files(root=ROOT):
    "Return the files with another address than settings.ini: path → new text."
    cfg, res = settings(root), {}
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    old = re.search(r'^Repository = "(.*)"$', text, re.M)[1]
    for path in notebooks(root):
        was = path.read_text(encoding="utf-8")
        if (now := rewrite(was, cfg, old)) != was:
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
    found = changed_files()
    if "--check" in sys.argv:
        for path in found:
            print(
                f"{path.relative_to(ROOT)} has another address than settings.ini: run `make"
                " address`"
            )
        sys.exit(bool(found))
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
