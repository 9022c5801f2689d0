"The documentation site builds, strictly, and shows what it should."

import html
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from project import ROOT

from tests.harness.browser import CHROMIUM, FLAGS
from tests.harness.site import FAINT, HOVERED, WIDER, opened, served

pytest.importorskip("material", reason="pip install mkdocs-material, to build the documentation")
pytestmark = pytest.mark.timeout(1800)  # 90 pages in a browser, on a machine that does other work


@pytest.fixture(scope="module")
def site():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs.py"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return ROOT / "_docs" / "site"


def words(path):
    return re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))


def pages():
    "The address of every page, relative to the site"
    from docs import MODULES, TUTORIALS, WRITTEN, reference

    names = [reference(m).removesuffix(".md") for m in MODULES]
    names += [f"tutorials/{t}" for t in TUTORIALS]
    names += [*WRITTEN, "options", "reference/index"]
    return [f"{n}/".removesuffix("index/") for n in names]


def test_pages(site):
    from docs import TUTORIALS, WRITTEN

    for page in pages():
        assert (site / page / "index.html").exists(), page
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")} <= {
        *WRITTEN.values()
    }
    assert {p.stem for p in (ROOT / "nbs" / "tutorials").glob("*.ipynb")} == {*TUTORIALS}
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_a_symbol_has_its_signature_comments_and_source(site):
    text = words(site / "reference" / "model" / "adapters" / "index.html")
    assert (
        re.search(r"\nr\s+Rank[^\n]*\s+int\s+8", text)  # a row of the parameter table
        and "Return a model with frozen base weights and a trainable adapter." in text
    )
    assert (
        "Choose device, precision, compilation and micro-batch size, where possible by measuring"
        in words(site / "reference" / "train" / "speed" / "index.html")
    )
    assert re.search(
        r'href="[^"]+/blob/main/minigpt/model/adapters.py#L\d+"',
        (site / "reference" / "model" / "adapters" / "index.html").read_text(encoding="utf-8"),
    )
    pictures = [
        (page.parent / picture)
        for page in (site / "tutorials").glob("*/index.html")
        for picture in re.findall(
            r'<img[^>]* src="([^":]+-\d+\.png)"', page.read_text(encoding="utf-8")
        )
    ]
    assert pictures and all(p.exists() for p in pictures)


def test_a_page_of_the_reference_has_no_tests_and_no_main(site):
    for page in (site / "reference").rglob("index.html"):
        text = html.unescape(words(page))
        assert "__main__." not in text, page
        assert not re.search(r"^(assert|test_eq|with expect_fail)\b", text, re.M), page


def test_an_example_stays_without_its_assertions():
    from examples import needed, without_tests

    assert without_tests("a = f(1)\n# equal\ntest_eq(a, 1)\nfor b in a:\n    assert b\na") == (
        "a = f(1)\na"
    )
    cells = [("a = 1", False), ("b = 2", False), ("print(a)", True), ("c = a", False)]
    assert needed(cells) == [True, False, True, False]


def test_a_signature_is_short():
    from signatures import readable

    text = "```python\ndef join(\n    team:__main__.Team, # The team\n"
    text += "    f:function=<lambda>, g:int=0\n"
    text += ")->minigpt.run.Run | None: # The run\n```"
    assert readable(text).splitlines()[0] == "`join(team, f, g)`"
    assert "| <code>team</code> | The team | <code>Team</code> |  |" in readable(text)
    assert "| returns | The run | <code>Run \\| None</code> |  |" in readable(text)
    one = "```python\ndef join(team:__main__.Team)->__main__.Team:\n```"
    assert "\njoin(team: Team) -> Team\n" in readable(one)


def test_a_text_that_announces_no_code_ends_in_a_period():
    from docs import sentences

    assert [*sentences(["This prints:", "```python\n1\n```", "Files:", "## Next"])] == [
        "This prints:",
        "```python\n1\n```",
        "Files.",
        "## Next",
    ]


def test_an_output_is_readable():
    from docs import text_output

    assert text_output("\x1b[31mred\x1b[0m\n10%\r100%\n") == (
        "```{ .text .no-copy .output .wrap }\nred\n100%\n```"
    )
    table = "name     size\nfirst   1 MiB\nsecond  2 MiB"
    assert ".wrap" not in text_output("step  loss\n1     2.0\n2     1.5") + text_output(table)


def test_every_option_is_described_from_one_source(site):
    "The page, the help of the command line and `TrainConfig` have the same words."
    from typer.main import get_command

    from minigpt.cli import app
    from minigpt.config.options import _CHOICES, TrainConfig, other_programs

    text = (site / "options" / "index.html").read_text(encoding="utf-8")
    sections = re.split(r'<h3 id="(\w+)">', text)
    sections = dict(
        zip(sections[1::2], (html.unescape(re.sub("<[^>]+>", "", s)) for s in sections[2::2]))
    )
    shown = {p.name: p.help for p in get_command(app).commands["train"].params}
    for group, fields in TrainConfig.groups().items():
        assert f">{group}<" in text
        for f in fields:
            says = sections[f.name]
            assert f.metadata["help"].replace("`", "") in says
            assert f.metadata["help"] in shown[f.name]
            others = [o for o, name in other_programs().aliases.items() if name == f.name]
            values = [repr(v) for v in (f.default, *_CHOICES.get(f.name, ()))]
            assert all(o in says for o in [type(f.default).__name__, *others, *values])


def test_the_search_index_has_every_option(site):
    from docs import SEARCH
    from minigpt.config.options import TrainConfig

    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert index["config"]["pipeline"] == SEARCH["pipeline"] and "stemmer" not in SEARCH["pipeline"]
    titles = {d["location"]: re.sub("<[^>]+>", "", d["title"]) for d in index["docs"]}
    for fields in TrainConfig.groups().values():
        for f in fields:
            assert titles[f"options/#{f.name}"] == f.name


def test_the_navigation(site):
    from docs import PACKAGES, navigation

    parts = {name: pages for part in navigation() for name, pages in part.items()}
    assert [name for p in parts["API reference"][1:] for name in p] == [
        o or "minigpt" for o in PACKAGES
    ]
    page = (site / "reference" / "data" / "readers" / "index.html").read_text(encoding="utf-8")
    assert 'class="md-footer__link md-footer__link--prev"' in page and 'rel="next"' in page
    for name in ("", "getting-started", "performance", "zh/getting-started"):
        text = (site / name / "index.html").read_text(encoding="utf-8")
        assert re.search(r'<article.*href="[./]*options/".*</article>', text, re.S), name


def test_the_home_page_is_for_users(site):
    home, contributing = (words(site / p / "index.html") for p in ("", "contributing"))
    assert "make demo" not in home and "make test" not in home
    assert "make demo" in contributing and "make test" in contributing
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "colab.research.google.com/github" in page and 'hreflang="zh"' in page
    assert all(f'href="{p}/"' in page for p in ("data", "fine-tuning", "contributing"))
    assert "Bit-identical resumes" in home and "<!-- README" not in page  # sections of README


# --- in a browser ---------------------------------------------------------------------------------
OTHERS = {
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "lr_schedule",
    "block_size": "max_seq_len",
}


@pytest.fixture(scope="module")
def address(site):
    with served(site) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    if (not CHROMIUM or not find_spec("playwright")) and not os.environ.get(
        "MINIGPT_REQUIRE_BROWSER"
    ):
        pytest.skip("needs playwright and Chromium (or one named in CHROMIUM)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def seen(chromium, address):
    "What each page shows at the width of a phone, and of a desktop in both schemes"
    page, found = opened(chromium, address), {}
    for name in pages():
        page.set_viewport_size(dict(width=375, height=800))
        page.goto(address + name, wait_until="load")
        page.add_style_tag(content="* {transition: none !important; animation: none !important}")
        found[name] = dict(phone=page.evaluate(WIDER))
        page.set_viewport_size(dict(width=1280, height=900))
        page.evaluate(HOVERED)
        for scheme in ("default", "slate"):
            page.evaluate(f"document.body.setAttribute('data-md-color-scheme', '{scheme}')")
            found[name][scheme] = page.evaluate(FAINT)
    return found


def test_what_is_too_wide_or_too_faint_is_seen(chromium, address):
    page = opened(chromium, address, viewport=dict(width=375, height=800))
    page.goto(address)
    faint = '<p style="color: #999; width: 900px">wide and faint</p>'
    page.evaluate(f"document.querySelector('article').insertAdjacentHTML('beforeend', '{faint}')")
    width, room, wide = page.evaluate(WIDER)
    assert width > room or wide
    assert "wide and faint" in page.evaluate(FAINT)[1].values()


def test_no_page_overflows_a_phone(seen):
    for name, found in seen.items():
        width, room, wide = found["phone"]
        assert width <= room and not wide, name


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_all_text_can_be_read(seen, scheme):
    faint = {}
    for name, found in seen.items():
        words, here, light = found[scheme]
        assert words > 20 and (light > 0.5) == (scheme == "default")
        for which, text in here.items():
            faint.setdefault(which, (name, text))
    assert not faint


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_scheme_is_that_of_the_system(chromium, address, system):
    page = opened(chromium, address, color_scheme=system)
    page.goto(address)
    assert (page.evaluate(FAINT)[2] > 0.5) == (system == "light")


def test_the_search_finds_every_option(chromium, address):
    from options_page import option_names
    from playwright.sync_api import TimeoutError

    page = opened(chromium, address, viewport=dict(width=1280, height=900))
    page.goto(address, wait_until="load")
    page.click(".md-search__input")
    links, lost = "[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)", {}
    for query, name in {**{o: o for o in option_names()}, **OTHERS}.items():
        page.fill(".md-search__input", query)
        page.dispatch_event(".md-search__input", "keyup")
        found = f"{links}.slice(0, 5).some(a => a.match(/\\/options\\/.*#{name}$/))"
        try:
            page.wait_for_function(found, timeout=10_000)
        except TimeoutError:
            lost[query] = page.evaluate(links)[:5]
    assert not lost
