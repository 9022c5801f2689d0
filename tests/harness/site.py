"""The documentation site in a Chromium without a window: what a page measures of itself."""

import functools
import http.server
import threading
from contextlib import contextmanager

# Widths of a page and of its window, and what reaches beyond it outside a box that scrolls
WIDER = """() => {
  const width = document.documentElement.clientWidth;
  const boxed = e => e && e !== document.body
    && (getComputedStyle(e).overflowX !== 'visible' || boxed(e.parentElement));
  const beyond = e => e.getBoundingClientRect().right > width + 1;
  const wide = [...document.querySelectorAll('.md-content *')].filter(
    e => beyond(e) && !boxed(e.parentElement));
  const named = wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120));
  return [document.documentElement.scrollWidth, width, named];
}"""
# Text below a contrast of 4.5 : 1, with what is behind it; opacity of ancestors counts
FAINT = """() => {
  const numbers = s => s.match(/[\\d.]+/g).map(Number);
  const rgba = s => [...numbers(s), 1].slice(0, 4);
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const behind = new Map();
  const back = e => {
    if (!e) return [255, 255, 255];
    const own = () => rgba(getComputedStyle(e).backgroundColor);
    if (!behind.has(e)) behind.set(e, over(own(), back(e.parentElement)));
    return behind.get(e);
  };
  const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const faint = {}, words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (words.nextNode()) {
    const text = words.currentNode.data.trim(), e = words.currentNode.parentElement;
    if (!text || e.closest('script, style, noscript') || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), shown = opacity(e);
    if (style.visibility === 'hidden' || shown === 0) continue;
    const color = rgba(style.color), bottom = back(e);
    const [a, b] = [light(over([...color.slice(0, 3), color[3] * shown], bottom)), light(bottom)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    seen++;
    const what = `${e.tagName} ${e.className} ${style.color} on ${bottom.map(Math.round)}`;
    if (ratio < 4.5) faint[`${what}: ${ratio.toFixed(2)}`] = text.slice(0, 30);
  }
  return [seen, faint, light(back(document.body))];
}"""

# Links under the mouse, on the page and in code
HOVERED = """() => document.querySelector('.md-content article').insertAdjacentHTML('beforeend',
  `<p style="color: var(--md-accent-fg-color)">a <code style="color: inherit">b</code></p>`)"""


@contextmanager
def served(folder):
    "Serve a folder; yield its address."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def opened(chromium, address, **options):
    "A page of the browser that reaches nothing but the site."
    context = chromium.new_context(**options)
    at_home = lambda url: url.startswith(address)
    context.route("**/*", lambda r: r.continue_() if at_home(r.request.url) else r.abort())
    return context.new_page()
