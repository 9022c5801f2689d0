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
stranger = {"<img src=x onerror=document.title=1>.层": torch.zeros(3)}
write_safetensors("steps/from_a_stranger.safetensors", stranger)
from minigpt.widgets import CheckpointExplorer
CheckpointExplorer("steps")"""


def test_checkpoint_explorer(show, lab):
    page = show(CHECKPOINTS)
    explorer = page.locator(".minigpt-checkpoint-explorer")
    tab = lambda i: explorer.locator(".lm-TabBar-tab, .p-TabBar-tab").nth(i).click()
    choose = lambda label, option: explorer.get_by_label(label, exact=True).select_option(option)
    seen = lambda text: explorer.get_by_text(text).first.wait_for()

    seen("from_a_stranger.safetensors: safetensors file")
    seen("89.7%")
    choose("checkpoint", "checkpoint-30")
    seen("step 30")
    explorer.get_by_text("tensor", exact=True).click()
    choose("layer", "model.layers.1")
    choose("component", "optimizer")
    seen("exp_avg_sq/model.layers.1.mlp.up_proj.weight")
    expect(explorer.get_by_text("model.layers.0.")).to_have_count(0)
    save_screenshot(page, "explorer-bytes")

    tab(1)
    choose("since", "checkpoint-10")
    seen("20 steps")
    save_screenshot(page, "explorer-changes")

    tab(2)
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

    tab(3)
    seen("save weights only")
    save_screenshot(page, "explorer-advice")
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
    save_screenshot(page, "dashboard")
    dashboard.get_by_text("resume", exact=True).click()
    dashboard.get_by_text("step 40 of 40").first.wait_for()
    expect(dashboard.get_by_text("resume", exact=True)).to_be_disabled()


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
