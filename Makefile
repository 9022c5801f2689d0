# `make` alone lists the targets. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
# How many notebooks run at once; they use several cores themselves.
NB_WORKERS ?= 1
# How many tests run at once, each file by one process.
PYTEST_WORKERS ?= 2

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test check notebooks pytest bench compat compat-transformers compat-nbdev compat-widgets export readme address \
        clean-notebooks hooks bump docs clean

BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
CONFIG := settings.ini setup.py pyproject.toml constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait sleep instead of spinning: on a machine shared with other work, spinning makes small models a hundred times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Notebooks and tests compare with what a CPU computes, on a machine with a GPU too.
notebooks pytest: export CUDA_VISIBLE_DEVICES ?=

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-installed ## set up .venv, then run examples/demo.py
	@python examples/demo.py

test: $(VENV)/.dev-installed ## all that CI runs: export and notebooks clean, notebooks run, pytest
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory notebooks
	@$(MAKE) --no-print-directory pytest

check: $(VENV)/.dev-installed ## modules equal what nbs/ exports, notebooks clean, README and addresses fresh
	@python tools/check.py

notebooks: $(VENV)/.dev-installed ## run every notebook (nbdev-test)
	@echo "Running the notebooks (each takes from seconds to a few minutes)"
	@nbdev-test nbs --n-workers $(NB_WORKERS) --do-print --timing

pytest: $(VENV)/.dev-installed ## the tests in tests/
	@python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile

bench: $(VENV)/.dev-installed ## run every measurement in bench/
	@for f in bench/[a-z]*.py; do echo "== $$f"; python -m "bench.$$(basename "$$f" .py)" || exit 1; done

compat: compat-transformers compat-nbdev compat-widgets ## the other supported versions: transformers 4.57, nbdev 2.4, ipywidgets 7.7

compat-transformers: .venv-compat-transformers/.installed
	@.venv-compat-transformers/bin/python -m pytest -q tests/interop/test_transformers.py tests/interop/test_diffusion.py

compat-nbdev: .venv-compat-nbdev/.installed
	@.venv-compat-nbdev/bin/python tools/compat_nbdev.py

compat-widgets: .venv-compat-widgets/.installed
	@.venv-compat-widgets/bin/python -m pytest -q tests/notebooks/test_browser.py tests/notebooks/test_chat_browser.py

export: $(VENV)/.dev-installed ## nbs/ to minigpt/ (nbdev-export)
	@nbdev-export

readme: $(VENV)/.dev-installed ## README.md from nbs/index.ipynb
	@python tools/readme.py

address: $(VENV)/.dev-installed ## put settings.ini's user/repo into badges, install cells, urls
	@python tools/address.py
	@nbdev-export
	@python tools/readme.py

clean-notebooks: $(VENV)/.dev-installed ## strip execution counts, widget state and stray metadata from nbs/
	@python tools/clean.py

hooks: $(VENV)/.dev-installed ## this clone: merge notebooks with nbdev, refuse to commit unclean ones
	@python tools/hooks.py

bump: $(VENV)/.dev-installed ## next version: make bump [PART=major|minor|patch] or make bump TO=1.2.3
	@python tools/bump.py $(or $(TO),$(PART),patch)

docs: $(VENV)/.dev-installed ## the documentation site, to _docs/site
	@python tools/docs.py

clean: ## remove build output and caches; keeps .venv
	@rm -rf build dist _docs _proc .pytest_cache .hypothesis *.egg-info
	@find minigpt nbs tests tools examples bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# --- environments: made once, installed again when the configuration changes ---------------------------------------------------
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "minigpt needs Python 3.10 or newer, and $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Creating $(1) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(1)
endef

$(BIN)/python:
	$(call make_venv,$(VENV))

$(VENV)/.demo-installed: $(CONFIG) | $(BIN)/python
	@echo "Installing minigpt into $(VENV) (PyTorch is large: the first time can take some minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev-installed: $(CONFIG) | $(BIN)/python
	@echo "Installing minigpt and its development tools into $(VENV) (PyTorch is large: the first time can take some minutes)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo-installed

.venv-compat-transformers/.installed: $(CONFIG)
	$(call make_venv,.venv-compat-transformers)
	@echo "Installing minigpt with transformers 4.57 (some minutes)"
	@.venv-compat-transformers/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e . \
	  'transformers>=4.57,<5' accelerate pytest pytest-timeout hypothesis
	@touch $@

.venv-compat-nbdev/.installed: $(CONFIG)
	$(call make_venv,.venv-compat-nbdev)
	@echo "Installing minigpt with nbdev 2.4 (some minutes)"
	@.venv-compat-nbdev/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e . \
	  'nbdev==2.4.14' 'execnb<0.2' 'fastcore<2' 'ghapi<2' ipykernel
	@touch $@

# The widgets of Colab, in a JupyterLab that takes them.
.venv-compat-widgets/.installed: $(CONFIG)
	$(call make_venv,.venv-compat-widgets)
	@echo "Installing minigpt with ipywidgets 7.7 and JupyterLab 3.6 (some minutes)"
	@.venv-compat-widgets/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[data]' \
	  jupyterlab==3.6.8 ipywidgets==7.7.1 jupyterlab_widgets==1.1.11 widgetsnbextension==3.6.10 jupyterlab_pygments==0.2.2 \
	  jupyter_server==1.24.0 notebook==6.5.7 nbclassic==1.1.0 ipykernel==6.17.1 ipython==7.34.0 traitlets==5.7.1 \
	  playwright pytest pytest-timeout
	@touch $@
