"The chat widget in a real browser: streamed answers, Stop, an interrupted kernel, settings."

import re

import ipykernel  # after the skip conditions

from tests.conftest import ROOT
from tests.notebooks.test_browser import expect, lab, save_screenshot, show

CHAT = r"""
import sys, time
sys.path.insert(0, %r)
from minigpt.model.gpt import GPTConfig
from minigpt.tokenizer.bpe import train_tokenizer
from tests.harness.scripted import Scripted
tok = train_tokenizer(["Rain?"]*9, 400)
said = "<think>\nIs there a <b>cloud</b>?\n</think>\n\n"
model = Scripted(GPTConfig(
    vocab_size=tok.vocab_size, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=16, max_len=2000))
call = '<tool_call>\n{"name": "weather", "arguments": {"city": "武汉"}}\n</tool_call>'
model.script(
    tok, said+'One look.\n'+call, "no "*40+"<script>document.title = 1</script>", "never "*200,
    "interrupt "*200, "Once more.", pause=.03)
def weather(city:str): return dict(rain=False, said=[chat.chat.system, chat.chat.temperature])
from minigpt.widgets import ChatBox
chat = ChatBox((model, tok), tools=[weather])
chat"""


def test_chat(show):
    page = show(CHAT % str(ROOT))
    box = page.locator(".minigpt-chat")
    field, seen = (
        box.locator("input[type=text]").first,
        lambda text: box.get_by_text(text).first.wait_for(),
    )
    ask = lambda text: (field.fill(text), field.press("Enter"))
    box.get_by_text("system prompt and temperature").click()
    box.locator("textarea").fill("Be brief.")
    box.locator("textarea").blur()
    ask("Will it rain <b>today</b>?")
    seen("Will it rain <b>today</b>?")
    seen("Is there a <b>cloud</b>?")
    seen(re.compile("Be brief"))  # in the result of the call
    growing = box.get_by_text(re.compile(r"^(no )+")).last
    lengths = {len(growing.inner_text()) for _ in range(40) if page.wait_for_timeout(50) is None}
    assert len(lengths) >= 3, f"the answer was not streamed:  {lengths}"
    save_screenshot(page, "chat-writing")
    seen("<script>document.title = 1</script>")
    expect(box.get_by_text("stop", exact=True)).to_be_disabled()
    box.get_by_text("thoughts").first.click()

    ask("Stop?")
    seen(re.compile("never never"))
    box.get_by_text("stop", exact=True).click()
    seen("stopped")
    expect(box.get_by_text("send", exact=True)).to_be_enabled()
    ask("Interrupt?")
    seen(re.compile("interrupt interrupt"))
    for _ in range(9):  # an interrupt between two parts of the answer has no effect
        page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()"
        )
        page.wait_for_timeout(100)
        if box.get_by_text("interrupted").count():
            break
    else:
        assert (
            ipykernel.version_info[0] >= 7
        )  # there, JupyterLab handles widgets in a thread, which no interrupt reaches
        box.get_by_text("stop", exact=True).click()
    expect(box.get_by_text("send", exact=True)).to_be_enabled()
    ask("Again?")
    seen("Once more.")
    expect(box.get_by_text("send", exact=True)).to_be_enabled()
    save_screenshot(page, "chat")
    assert page.title() != "1"
    box.get_by_text("reset", exact=True).click()
    expect(box.get_by_text("Once more.")).to_have_count(0)
