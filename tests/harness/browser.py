"""JupyterLab in a headless Chromium, so that tests see what a user of the widgets sees.

All files are written to a temporary folder.
"""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMING = os.environ.get("MINIGPT_BROWSER_COMING")  # exists while .ci/run installs it
for _ in range(900):
    if not COMING or not os.path.exists(COMING):
        break
    time.sleep(1)
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}  # render cells outside the view too
READY = (
    "() =>"
    " window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus ==="
    " 'connected'"
)
RUN = """async () => {
  const {commands, shell} = window.jupyterapp, panel = shell.currentWidget;
  await panel.sessionContext.ready; await panel.sessionContext.session.kernel.info;
  shell.collapseLeft();
  window.ran = commands.execute('notebook:run-all-cells');
}"""
ERRORS = """() => window.jupyterapp.shell.currentWidget.context.model.toJSON().cells.flatMap(c =>
  (c.outputs || []).filter(o => o.output_type === 'error')
    .map(o => [o.ename + ': ' + o.evalue, ...o.traceback].join('\\n')))"""


class Lab:
    "One JupyterLab server and one browser; each notebook is a page with its own kernel."

    def __init__(self, folder):
        from playwright.sync_api import sync_playwright

        self.folder, self.names = Path(folder), (f"n{i}.ipynb" for i in itertools.count())
        (self.folder / "config/labconfig").mkdir(parents=True)
        (self.folder / "config/labconfig/default_setting_overrides.json").write_text(
            json.dumps(SETTINGS)
        )
        (self.folder / "nbs").mkdir()
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_WAIT_POLICY": "PASSIVE",
            "JUPYTER_CONFIG_DIR": str(self.folder / "config"),
            "JUPYTER_DATA_DIR": str(self.folder / "data"),
            "IPYTHONDIR": str(self.folder / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(self.folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(self.folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.folder / "workspaces"),
        }
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log = open(self.folder / "lab.log", "w+")
        self.server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                f"--port={port}",
                "--ip=127.0.0.1",
                "--LabApp.expose_app_in_browser=True",
                f"--ServerApp.root_dir={self.folder / 'nbs'}",
            ],
            env=env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self.play = self.browser = None
        try:
            facts = self.facts()
            self.url, self.token = facts["url"], facts["token"]
            self.play = sync_playwright().start()
            self.browser = self.play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            self.context = self.browser.new_context(viewport=dict(width=1200, height=1400))
            self.context.set_default_timeout(60_000)
        except BaseException:
            self.close()
            raise

    def facts(self, seconds=60):
        "Return the address and the token of the server once it listens."
        path, end = (
            self.folder / f"runtime/jpserver-{self.server.pid}.json",
            time.monotonic() + seconds,
        )
        while time.monotonic() < end and self.server.poll() is None:
            try:
                return json.loads(path.read_text())
            except (FileNotFoundError, ValueError):
                time.sleep(0.1)
        raise RuntimeError(
            f"JupyterLab did not start:\n{(self.folder / 'lab.log').read_text()[-2000:]}"
        )

    def open(self, *cells, wait=True):
        """Run `cells` in a new notebook and return its page; raise if a cell raises.

        With `wait=False` the cells may still be running.
        """
        name = next(self.names)
        nb = dict(
            nbformat=4,
            nbformat_minor=5,
            metadata=dict(
                kernelspec=dict(name="python3", display_name="Python 3", language="python")
            ),
            cells=[
                dict(
                    cell_type="code",
                    id=f"c{i}",
                    execution_count=None,
                    metadata={},
                    outputs=[],
                    source=s,
                )
                for i, s in enumerate(cells)
            ],
        )
        (self.folder / "nbs" / name).write_text(json.dumps(nb))
        page = self.visit(name)
        page.wait_for_function(READY)
        page.evaluate(RUN)
        if wait:
            self.ran(page)
        return page

    def visit(self, name):
        "Open a notebook in a new page."
        page = self.context.new_page()
        page.goto(f"{self.url}lab/workspaces/{Path(name).stem}/tree/{name}?token={self.token}")
        return page

    def save(self, page) -> Path:
        "Save the notebook of a page; return its file."
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        path = page.evaluate("() => window.jupyterapp.shell.currentWidget.context.path")
        return self.folder / "nbs" / Path(path).name

    def ran(self, page):
        "Wait until all cells of `page` have run."
        page.evaluate("() => window.ran")
        if errors := page.evaluate(ERRORS):
            raise AssertionError(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(errors)))

    def close(self):
        if self.browser:
            self.browser.close()
        if self.play:
            self.play.stop()
        self.server.terminate()  # shuts down the kernels first
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.server.kill()
        self.log.close()
