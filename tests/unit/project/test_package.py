"""The package: one version and address, light imports, modules in order.

Also the contents of the wheel, and notebooks in order.
"""

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import address
import pytest
import readme
from project import PACKAGES, ROOT, directives, joined, lessons, notebooks, settings

import minigpt

numbered = lessons()
every = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    "Return the directives and the source of each code cell."
    return [
        directives(joined(c["source"])) for c in load(path)["cells"] if c["cell_type"] == "code"
    ]


def module_names():
    "Return the modules that notebooks export, in reading order."
    return [
        flags["default_exp"]
        for path in numbered
        for flags, _ in code_cells(path)
        if "default_exp" in flags
    ]


def tracked():
    "Return the files that are or would be in the repository."
    out = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if out.returncode:
        pytest.skip("not a git checkout: the files of the repository are unknown")
    return [p for o in out.stdout.split("\0") if o and (p := ROOT / o).is_file()]


def texts():
    "Return the text files of the repository: relative path → contents."
    for p in tracked():
        with contextlib.suppress(UnicodeDecodeError):
            yield p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")


# --- version and address --------------------------------------------------------------------------
def test_version_is_the_same_everywhere():
    import minigpt

    assert minigpt.__version__ == settings()["version"]


def test_pyproject_agrees_with_settings():
    cfg, text = settings(), (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in [
        f'name = "{cfg["lib_name"]}"',
        f'lib_path = "{cfg["lib_path"]}"',
        f'branch = "{cfg["branch"]}"',
        f'tst_flags = "{cfg["tst_flags"]}"',
        f'Repository = "{cfg["git_url"]}"',
        f"allowed_metadata_keys = {json.dumps(cfg['allowed_metadata_keys'].split())}",
    ]:
        assert line in text.splitlines(), line


def test_all_files_use_one_address():
    assert not address.changes(), "names another address than settings.ini: run `make address`"


def test_new_address_replaces_every_form():
    old = "https://github.com/someone/minigpt"
    text = (
        "https://colab.research.google.com/github/someone/minigpt/blob/main/nbs/a.ipynb pip install"
        " git+https://github.com/someone/minigpt\\ngit+https://github.com/someone/minigpt.git@v1"
        " (https://github.com/someone/minigpt). https://github.com/someone/minigpt-other"
        " https://github.com/other/nanoGPT"
    )
    cfg = dict(user="new", repo="gpt.x", branch="dev")
    assert (
        address.rewritten(text, cfg, old)
        == "https://colab.research.google.com/github/new/gpt.x/blob/dev/nbs/a.ipynb pip install"
        " git+https://github.com/new/gpt.x\\ngit+https://github.com/new/gpt.x.git@v1"
        " (https://github.com/new/gpt.x). https://github.com/someone/minigpt-other"
        " https://github.com/other/nanoGPT"
    )
    moved = address.rewritten(text, cfg, old)
    assert address.rewritten(moved, cfg, "https://github.com/new/gpt.x") == moved


@every
def test_badges_open_an_existing_notebook(path):
    branch = settings()["branch"]
    for target in re.findall(
        rf"colab\.research\.google\.com/github/[^/]+/[^/]+/blob/{branch}/([^)\s\"'\\]+)",
        path.read_text(encoding="utf-8"),
    ):
        assert (ROOT / target).is_file(), target


def test_readme_is_fresh():
    assert not readme.stale(), "stale: run `make readme`"


def test_readme_rendering():
    png = "iVBORw0KGgo="
    cell = lambda source, outputs=(): dict(cell_type="code", source=source, outputs=list(outputs))
    text, pictures = readme.render(
        dict(
            cells=[
                dict(
                    cell_type="markdown",
                    source=(
                        "# t\n[a](tutorials/a.ipynb#x) [b](../LICENSE) [c](https://x.y) `[d](e)`"
                    ),
                ),
                cell("#| hide\nsecret()"),
                cell(
                    "#| echo: false\nsilent()",
                    [dict(output_type="stream", name="stdout", text=["\x1b[31mred\x1b[0m\n"])],
                ),
                cell(
                    "#| export\n#| eval: false\n\nf()",
                    [
                        dict(
                            output_type="display_data",
                            data={"image/png": png, "text/plain": "<Figure>"},
                        )
                    ],
                ),
            ]
        )
    )
    assert text == (
        readme.head
        + "\n# t\n[a](nbs/tutorials/a.ipynb#x) [b](LICENSE) [c](https://x.y) `[d](e)`\n\n"
        "```\nred\n```\n\n```python\nf()\n```\n\n![](nbs/images/index-1.png)\n"
    )
    assert list(pictures) == ["nbs/images/index-1.png"]


# --- imports --------------------------------------------------------------------------------------
def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import minigpt; t = time.perf_counter() -"
        " t\nprint(t, *[o for o in ('torch', 'ipywidgets', 'matplotlib', 'IPython', 'nbdev') if o"
        " in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    print(f"import minigpt: {float(out[0]) * 1000:.1f} ms (limit: 200)")
    assert not out[1:], f"import minigpt pulls in {out[1:]}"
    assert float(out[0]) < 2


def imported(path):
    "Return the modules of minigpt that a module imports anywhere."
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (o.name for o in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield module
            yield from (f"{module}.{o.name}" for o in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (o.value for o in node.args if isinstance(o, ast.Constant))


def path_of_module(module):
    return ROOT / "minigpt" / f"{module.replace('.', '/')}.py"


def test_imports_of_a_module_are_found():
    found = {*imported(path_of_module("train.trainer"))}
    assert {"minigpt.run.backup", "minigpt.train.inputs", "minigpt.model.gpt.GPT"} <= found


def test_every_module_has_a_notebook():
    written = {"__init__.py", "__main__.py", "_modidx.py"}
    modules = [p for p in (ROOT / "minigpt").rglob("*.py") if p.name not in written]
    assert sorted(map(path_of_module, module_names())) == sorted(modules)


def test_notebook_and_module_have_the_same_path():
    for path in numbered:
        [room] = [f["default_exp"] for f, _ in code_cells(path) if "default_exp" in f]
        folder = path.relative_to(ROOT / "nbs").parent
        assert folder / path.stem.split("_", 1)[1] == Path(*room.split(".")), path


@pytest.mark.parametrize("module", module_names())
def test_modules_import_only_modules_above(module):
    above = {f"minigpt.{o}" for o in module_names()[: module_names().index(module)]}
    every_module = {f"minigpt.{o}" for o in module_names()}
    below = {*imported(path_of_module(module))} & every_module - above
    assert not below, f"{module} imports {sorted(below)}, which come after it"


@pytest.mark.parametrize("package", [p for p in PACKAGES if p not in ("core", "")])
def test_package_exports_the_names_of_its_modules(package):
    offered = import_module(f"minigpt.{package}")
    public = {
        name: module
        for path in module_names()
        if path.startswith(f"{package}.")
        for module in [import_module(f"minigpt.{path}")]
        for name in module.__all__
    }
    assert {*offered.__all__} == {*public}
    for name, module in public.items():
        assert getattr(offered, name) is getattr(module, name), name
    with pytest.raises(AttributeError, match=f"module 'minigpt.{package}' has no attribute 'x'"):
        offered.x


def test_old_module_names_are_importable():
    for old, new in minigpt.MOVED.items():
        sys.modules.pop(f"minigpt.{old}", None)
        with pytest.warns(FutureWarning, match=f"minigpt.{old} is now minigpt.{new}"):
            assert import_module(f"minigpt.{old}") is import_module(f"minigpt.{new}")


# --- the wheel ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy, so that an old build/ cannot leak into it."
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for p in tracked():
        to = tree / p.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, to)
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            out,
            ".",
        ],
        cwd=tree,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    [path] = out.glob("*.whl")
    with zipfile.ZipFile(path) as z:
        return path.name, {n: z.read(n) for n in z.namelist()}


def test_wheel_contains_only_the_package(wheel):
    name, files = wheel
    cfg = settings()
    info = f"{cfg['lib_name'].replace('-', '_')}-{cfg['version']}.dist-info"
    assert name.startswith(f"{cfg['lib_name'].replace('-', '_')}-{cfg['version']}-py3-none-any")
    assert {
        f"minigpt/{o}.py" for o in ["__init__", *(r.replace(".", "/") for r in module_names())]
    } <= files.keys()
    assert {n.split("/")[0] for n in files} == {"minigpt", info}
    data = {o for o, _ in texts() if o.startswith("minigpt/") and not o.endswith(".py")}
    assert data and data <= files.keys()
    assert not [n for n in files if n.endswith(".ipynb") or "test" in n]


def test_wheel_metadata(wheel):
    _, files = wheel
    cfg = settings()
    read = lambda name: next(
        raw.decode() for n, raw in files.items() if n.endswith(f".dist-info/{name}")
    )
    meta = read("METADATA")
    points = read("entry_points.txt").replace(" ", "")
    assert cfg["console_scripts"] in points.splitlines()
    assert (
        "License-Expression: Apache-2.0" in meta
        and f"Requires-Python: >={cfg['min_python']}" in meta
    )
    assert f"Project-URL: Repository, {cfg['git_url']}" in meta
    needed = [o for o in re.findall(r"^Requires-Dist: (.*)$", meta, re.M) if "extra ==" not in o]
    assert len(needed) == len(cfg["requirements"].split()) and "torch>=2.4" in needed
    assert not [o for o in needed if re.match(r"nbdev|transformers|fastcore", o)], (
        "a development dependency at run time"
    )


# --- contents of the files ------------------------------------------------------------------------
def test_no_file_names_a_package_index_or_a_local_path():
    hosts = [
        "pypi" + ".org",
        "files.python" + "hosted",
        "download.pytorch" + ".org",
        "registry.npm" + "js",
        "deb.deb" + "ian",
    ]
    place = re.compile(r"(?<![\w.$}~-])/(?:" + "|".join(["work", "farm", "root", "opt"]) + r")/")
    for path, text in texts():
        for n, line in enumerate(text.splitlines(), 1):
            assert not any(h in line for h in hosts) and not place.search(line), (
                f"{path}:{n}: {line[:160]}"
            )


def test_advice_never_installs_another_package():
    wrong = re.compile(r"pip3?\s+install[^\n]*?[\s\"'=](?<![\w/-])" + "minigpt" + r"(?![\w/.-])")
    install = "pip " + "install"
    assert wrong.search(f"{install} -U minigpt") and wrong.search(f"{install} 'minigpt[data]'")
    assert not wrong.search(
        f"{install} 'minigpt-notebook[data] @ git+https://github.com/a/minigpt'"
    )
    for path, text in texts():
        for n, line in enumerate(text.splitlines(), 1):
            assert not wrong.search(line), f"{path}:{n}: {line[:160]}"


# --- notebooks ------------------------------------------------------------------------------------
@every
def test_outputs_are_small(path):
    assert path.stat().st_size < 500_000, f"{path.stat().st_size / 1000:.0f} kB in all"
    for i, cell in enumerate(load(path)["cells"]):
        size = len(json.dumps(cell.get("outputs", [])))
        assert size < 50_000, f"cell {i}: {size / 1000:.0f} kB of output"


@pytest.mark.parametrize("path", [*numbered, ROOT / "nbs" / "index.ipynb"], ids=lambda p: p.stem)
def test_notebook_ends_in_the_hidden_export_cell(path):
    flags, source = code_cells(path)[-1]
    assert (
        load(path)["cells"][-1]["cell_type"] == "code"
        and "hide" in flags
        and source.endswith("nbdev_export()")
    )


@every
def test_notebooks_are_clean(path):
    clean = pytest.importorskip("clean", reason="needs nbdev 3")
    assert not clean.unclean([path]), "run `make clean-notebooks`"


def test_cleaning_keeps_the_accelerator_and_drops_widgets():
    clean = pytest.importorskip("clean", reason="needs nbdev 3")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": ["HBox()"]}
    outputs = [
        dict(output_type="display_data", metadata={}, data=view),
        dict(output_type="display_data", metadata={}, data={**view, "text/html": ["<b>"]}),
    ]
    nb = dict(
        nbformat=4,
        nbformat_minor=5,
        cells=[
            dict(
                cell_type="code",
                id="a",
                execution_count=3,
                metadata={"x": 1},
                source=["f()"],
                outputs=outputs,
            )
        ],
        metadata=dict(
            accelerator="GPU", colab={"gpuType": "T4"}, widgets={"state": {}}, language_info={}
        ),
    )
    res = json.loads(clean.cleaned(json.dumps(nb)))
    assert res["metadata"] == dict(accelerator="GPU", colab={"gpuType": "T4"})
    [cell] = res["cells"]
    assert cell["execution_count"] is None and cell["metadata"] == {}
    assert [sorted(o["data"]) for o in cell["outputs"]] == [["text/html", "text/plain"]]
    assert clean.cleaned(clean.cleaned(json.dumps(nb))) == clean.cleaned(json.dumps(nb))
