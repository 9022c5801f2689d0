"""Widgets in a real browser: what a user sees and clicks.

`make compat-widgets` runs the same tests with ipywidgets 7.7, the version of Colab.
"""

import json
import os
import re
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.harness.browser import CHROMIUM, Lab

missing = [o for o in ("jupyterlab", "playwright") if not find_spec(o)] + [
    "Chromium (or one named in CHROMIUM)"
] * (not CHROMIUM)
if missing and not os.environ.get("MINIGPT_REQUIRE_BROWSER"):
    pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)

from playwright.sync_api import expect

expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    assert not missing, (
        f"MINIGPT_REQUIRE_BROWSER is set, but these are missing: {', '.join(missing)}"
    )
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


def save_screenshot(page, name):
    "Save a screenshot of the page if MINIGPT_SHOTS names a folder."
    if shots := os.environ.get("MINIGPT_SHOTS"):
        page.screenshot(path=Path(shots) / f"{name}.png")


@pytest.fixture
def show(lab, request):
    "Run cells in a notebook and return its page."
    pages = []

    def run(*cells, **kwargs):
        pages.append(lab.open(*cells, **kwargs))
        return pages[-1]

    yield run
    for page in pages:
        save_screenshot(page, request.node.name)
        page.evaluate(
            "() => { window.jupyterapp.shell.currentWidget.sessionContext.shutdown() }"
        )  # not awaited
        page.close()


def test_data_explorer(show):
    page = show(r"""
from pathlib import Path
talk = ('{"conversations": [{"role": "user", "content": "How many?"}, '
        '{"role": "assistant", "content": "There are %d."}]}\n')
bad = ('{"conversations": [{"role": "narrator", '
       '"content": "<script>document.title = 1</script> %d"}]}\n')
Path("sums.jsonl").write_text("".join(talk % i for i in range(20)) + bad % 1 + bad % 2)
from minigpt.widgets import data_explorer
data_explorer("sums.jsonl")""")
    explorer = page.locator(".minigpt-data-explorer")
    explorer.get_by_text("1 of 20 · ").wait_for()
    explorer.locator("select").first.select_option("unknown role (2)")
    explorer.get_by_text("1 of 2 · ").wait_for()
    explorer.get_by_text("next ▶").click()
    explorer.get_by_text(re.compile(r"2 of 2 · sums.jsonl line 22")).wait_for()
    explorer.get_by_text("<script>document.title = 1</script> 2").wait_for()
    assert page.title() != "1"


# The contrast of each text of our HTML with its background, bars included; the smallest first
CONTRASTS = r"""boxes => {
  const numbers = c => [...c.match(/[\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, below) => [0, 1, 2].map(i => top[i]*top[3] + below[i]*(1 - top[3])).concat(1);
  const linear = c => c/255 <= .04045 ? c/255/12.92 : ((c/255 + .055)/1.055)**2.4;
  const luminance = c => .2126*linear(c[0]) + .7152*linear(c[1]) + .0722*linear(c[2]);
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => p - q);
    return (y + .05)/(x + .05);
  };
  const ground = e => {
    const colors = [];
    for (; e; e = e.parentElement) colors.unshift(numbers(getComputedStyle(e).backgroundColor));
    return colors.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [];
  for (const box of boxes) {
    const texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    for (let n; n = texts.nextNode();) {
      const e = n.parentElement, style = getComputedStyle(e);
      if (!n.data.trim() || !e.getClientRects().length) continue;
      const bars = [...style.backgroundImage.matchAll(/rgba?\([^)]*\)/g)].map(m => numbers(m[0]));
      for (const g of [ground(e), ...bars.map(b => over(b, ground(e)))])
        found.push([contrast(over(numbers(style.color), g), g), n.data.trim().slice(0, 60)]);
    }
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""
# Parts of a widget that are wider than the page
WIDE = r"""widget => [...widget.querySelectorAll('*')].filter(e => e.getClientRects().length
  && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible'
  && e.tagName != 'SELECT' && e.tagName != 'INPUT')
  .map(e => [e.tagName, e.className, e.innerText.slice(0, 60)])"""


def is_readable(page, widget, name):
    "Check contrasts and widths, in light and dark, on a laptop and on a phone"
    for theme in "Light", "Dark":
        change = "t => window.jupyterapp.commands.execute('apputils:change-theme', {theme: t})"
        page.evaluate(change, f"JupyterLab {theme}")
        expect(page.locator("body")).to_have_attribute(
            "data-jp-theme-light", "true" if theme == "Light" else "false"
        )
        for width in 1280, 390:
            page.set_viewport_size(dict(width=width, height=1400))
            page.wait_for_timeout(500)
            save_screenshot(page, f"{name}-{theme}-{width}")
            contrasts = widget.locator(".minigpt").evaluate_all(CONTRASTS)
            assert contrasts and contrasts[0][0] >= 4.5, (theme, contrasts[:3])
            assert not widget.evaluate(WIDE), (theme, width)
    page.set_viewport_size(dict(width=1200, height=1400))


CHECKPOINTS = r"""
import torch
from pathlib import Path
from minigpt.checkpoint import State, pack_optimizer, pack_rng, write_checkpoint, write_safetensors
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.tokenizer.bpe import train_tokenizer
torch.manual_seed(0); torch.set_num_threads(1)
tok = train_tokenizer(["Where do the bytes go? 字节去哪儿了？"]*9, vocab_size=300)
model = GPT(GPTConfig(vocab_size=300, dim=64, n_layer=3, n_head=4, n_kv_head=2, ffn_dim=128))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in 10, 20, 30:
    ids = torch.randint(0, 300, (4, 33))
    model.loss(ids[:,:-1], ids[:,1:]).backward(); optimizer.step(); optimizer.zero_grad()
    state = State(model.config, model.weights(), tok, dict(global_step=step),
                  optimizer=pack_optimizer(optimizer, model), rng=pack_rng())
    write_checkpoint(Path("steps")/f"checkpoint-{step}", state)
untrusted = {"<img src=x onerror=document.title=1>.层": torch.zeros(3)}
write_safetensors("steps/untrusted.safetensors", untrusted)
from minigpt.widgets import CheckpointExplorer
CheckpointExplorer("steps")"""


def test_checkpoint_explorer(show, lab):
    page = show(CHECKPOINTS)
    explorer = page.locator(".minigpt-checkpoint-explorer")
    turn_to = lambda name: explorer.get_by_role("button", name=name, exact=True).click()
    choose = lambda label, option: explorer.get_by_label(label, exact=True).select_option(option)
    seen = lambda text: explorer.get_by_text(text).first.wait_for()

    seen("step 30")  # the newest, not the last by name
    choose("checkpoint", "untrusted.safetensors")
    seen("untrusted.safetensors: safetensors file")
    seen("89.7%")
    choose("checkpoint", "checkpoint-30")
    seen("step 30")
    explorer.get_by_text("tensor", exact=True).click()
    choose("layer", "model.layers.1")
    choose("component", "optimizer")
    seen("exp_avg_sq/model.layers.1.mlp.up_proj.weight")
    expect(explorer.get_by_text("model.layers.0.")).to_have_count(0)

    is_readable(page, explorer, "explorer-bytes")
    turn_to("changes")
    choose("since", "checkpoint-10")
    seen("20 steps")
    is_readable(page, explorer, "explorer-changes")

    turn_to("lower precision")
    explorer.locator(".widget-slider .ui-slider-handle, .widget-slider .noUi-handle").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    seen("in INT4")
    explorer.get_by_text("export", exact=True).click()
    seen(re.compile(r"steps/checkpoint-30-int4: [\d.]+ KiB"))
    made = lab.folder / "nbs/steps/checkpoint-30-int4"
    assert (made / "MANIFEST.json").exists() and (
        made / "model.safetensors"
    ).stat().st_size < 100_000
    save_screenshot(page, "explorer-export")
    explorer.get_by_text("export", exact=True).click()
    seen("already")

    turn_to("suggestions")
    seen("sorted by bytes on disk")
    seen("save weights only")
    is_readable(page, explorer, "explorer-advice")
    assert page.title() != "1"


TRAINING = r"""
import os, time
from pathlib import Path
from minigpt.model.gpt import GPTConfig
from minigpt.train.trainer import Callback, fit
from minigpt.widgets import RunDashboard
Path("hill.txt").write_text("The sun rose over the hill, and the boat was gone.\n\n"*3000)
Path("pid.txt").write_text(str(os.getpid()))
class Slow(Callback):
    def on_step(self, t):
        time.sleep(.1)  # slow enough to be seen
        if t.step == FAILS: raise OSError("the power was cut")
shape = GPTConfig(vocab_size=280, dim=32, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=64)
try:
    fit(shape, "hill.txt", output_dir="runs/NAME", tokenizer_vocab_size=280, max_seq_len=64,
        batch_size=4, max_steps=40, save_steps=20, logging_steps=4, eval_steps=40, num_threads=1,
        learning_rate=3e-3, callbacks=[Slow()])
except OSError: pass
"""


def cells(name, fails):
    return TRAINING.replace("NAME", name).replace("FAILS", str(fails))


def test_live_view_and_resume(show, lab):
    page = show(cells("hill", fails=32), "RunDashboard('runs/hill')", wait=False)
    header = page.get_by_text(re.compile(r"training, step \d+ of 40"))
    page.locator(".minigpt-chart").first.wait_for()
    seen = {header.inner_text() for _ in range(20) if page.wait_for_timeout(100) is None}
    assert len(seen) >= 2, f"the numbers did not move: {seen}"
    save_screenshot(page, "live-loss")
    lab.ran(page)
    page.get_by_text(re.compile("stopped, step 32 of 40")).first.wait_for()
    means = page.locator(".minigpt-charts path.mean").first
    expect(means).to_be_visible()
    page.locator(".minigpt-smooth").first.uncheck()  # without the kernel
    expect(means).to_be_hidden()

    dashboard = page.locator(".minigpt-run-dashboard")
    dashboard.get_by_text("checkpoint-20").first.wait_for()
    means = dashboard.locator(".minigpt-charts path.mean").first
    expect(means).to_be_visible()
    dashboard.locator(".minigpt-smooth").uncheck()
    expect(means).to_be_hidden()
    is_readable(page, dashboard, "dashboard")
    resume = dashboard.get_by_role("button", name="resume", exact=True)
    resume.click()
    expect(resume).to_be_hidden()  # it cannot answer meanwhile
    dashboard.get_by_text("step 40 of 40").first.wait_for()
    expect(resume).to_be_disabled()
    expect(resume).to_be_visible()


def no_lost_widgets(page):
    expect(page.locator(".minigpt-chart").first).to_be_visible()
    expect(page.get_by_text("Error displaying widget")).to_have_count(0)
    expect(page.get_by_text("model not found")).to_have_count(0)


def test_live_view_outlives_a_killed_kernel(show, lab):
    page = show(cells("killed", fails=-1), wait=False)
    page.locator(".minigpt-chart").first.wait_for()
    os.kill(int((lab.folder / "nbs/pid.txt").read_text()), signal.SIGKILL)
    page.wait_for_timeout(1000)
    header = page.get_by_text(re.compile(r"training, step \d+ of 40")).inner_text()
    lab.save(page)
    page.reload()
    page.get_by_text(header).wait_for()
    no_lost_widgets(page)
    save_screenshot(page, "killed")


def test_finished_notebook_reopens_trusted_or_not(show, lab):
    page = show(cells("finished", fails=-1))
    path = lab.save(page)
    saved = json.loads(path.read_text())
    again = lab.visit(path.name)
    again.get_by_text("finished, step 40 of 40").wait_for()
    no_lost_widgets(again)
    expect(again.locator(".minigpt-static").first).to_be_hidden()
    again.close()

    saved["cells"][0]["source"] += "# another notebook, which this Jupyter does not trust"
    other = path.with_name("from-elsewhere.ipynb")
    other.write_text(json.dumps(saved))
    again = lab.visit(other.name)
    again.get_by_text("finished, step 40 of 40").wait_for()
    expect(again.locator(".minigpt-static").first).to_be_visible()
    expect(again.locator(".minigpt-charts svg")).to_have_count(0)
    expect(again.get_by_text("Error displaying widget")).to_have_count(0)
    save_screenshot(again, "untrusted")
    again.close()
