# The whole project from a clean clone: `make book` and `make test`. `make help` lists the rest.
PY ?= python3
V := .venv/bin

# torch is installed first and by itself: it is the one package whose right build depends on the
# machine, so it stays out of requirements.lock. PIP_FIND_LINKS (a folder of wheels) and TORCH_INDEX
# (the address of an index that holds CPU builds) both say where to take it from.
TORCH := 2.13.0
TORCH_SOURCE = $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
COMES_WITH_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas \
  nvidia-cuda-cccl nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 \
  nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 \
  nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

# Nothing that runs here needs the network; a suite that downloads is asked for with HF_HUB_OFFLINE=0.
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := agg

.PHONY: help venv book test suites-check browser screenshots lint bench soak student slides epub pdf linkcheck audit colab-check lock clean distclean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

venv: .venv/.done ## make .venv from the hashed lock (a minute or two, once)

.venv/.done: requirements.lock pyproject.toml
	@command -v $(PY) >/dev/null || \
	  { echo "darkmatter needs Python 3.11, 3.12 or 3.13, but there is no '$(PY)' here: name one, as in 'make venv PY=python3.12'." >&2; exit 1; }
	@$(PY) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("darkmatter needs Python 3.11, 3.12 or 3.13, but $(PY) is %d.%d: name another one, as in \"make venv PY=python3.12\"." % v)'
	$(PY) -m venv .venv
	$(V)/python -m pip install -q --disable-pip-version-check uv
	$(V)/uv pip install -q -p $(V)/python torch==$(TORCH) $(TORCH_SOURCE)
	$(V)/uv pip install -q -p $(V)/python --no-deps --require-hashes -r requirements.lock
	$(V)/uv pip install -q -p $(V)/python --no-deps --no-build-isolation -e .
	@touch $@

book: venv ## run every chapter on the embedded suite and build the HTML in _build/html
	$(V)/python -m darkmatter.book build

test: lint ## lint, run the chapters that changed, then every test
	$(V)/python -m darkmatter.book execute
	$(V)/python -m pytest

suites-check: venv ## run eleven chapters on a random stand-in of gpt2-small (a quarter of an hour)
	$(V)/python -m tests.book.other_suite

browser: venv ## read the built book in a real browser: after `make book`
	DARKMATTER_HTML=_build/html $(V)/python -m pytest tests/browser

screenshots: venv ## pictures of five key pages in _build/screenshots: after `make book`
	$(V)/python -m tests.browser.screenshots _build/html _build/screenshots

lint: venv ## ruff, pyright strict on darkmatter/, and spelling
	$(V)/ruff check .
	$(V)/ruff format --check .
	$(V)/pyright
	$(V)/codespell

bench: venv ## time the numerical core against the published procedures
	$(V)/python -m tests.bench

soak: venv ## 200 surveys and 50 chapters in a row: memory, files and processes must not grow
	$(V)/python -m tests.soak

student: venv ## write book/student again: the chapters without their solutions
	$(V)/python -m darkmatter.book student

slides: venv ## a deck of slides for each part in _build/slides; after `make book` with figures
	$(V)/python -m darkmatter.book slides

epub: venv ## the book as one file for an e-reader: _build/epub
	$(V)/python -m darkmatter.book epub

pdf: venv ## the book as a PDF in _build/pdf, where LaTeX is installed
	$(V)/python -m darkmatter.book pdf

linkcheck: venv ## follow every link to another site (needs the network)
	$(V)/python -m darkmatter.book linkcheck

audit: venv ## look up every locked package among known vulnerabilities (needs the network)
	@echo torch==$(TORCH) > .venv/torch.constraint
	$(V)/uv tool run -q pip-audit --strict --disable-pip --no-deps --progress-spinner off \
	  -r requirements.lock -r .venv/torch.constraint

colab-check: ## install the wheel of this tree with ranges only, run a student and a solved chapter
	PY=$(PY) .ci/colab-check

lock: venv ## make requirements.lock and environment.yml again from pyproject.toml (LOCK_ARGS=--upgrade)
	@echo torch==$(TORCH) > .venv/torch.constraint
	$(V)/uv pip compile pyproject.toml -q --universal --python-version 3.11 --all-extras \
	  --generate-hashes --no-header --no-annotate -c .venv/torch.constraint \
	  $(COMES_WITH_TORCH:%=--no-emit-package %) $(LOCK_ARGS) -o requirements.lock
	$(V)/python -m darkmatter.book.environment

clean: ## remove everything that was built, but not .venv
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv *.egg-info
