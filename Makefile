# Everything starts here: `make demo` and `make test` need Python 3.11 to 3.13 and make, and set up the rest by themselves.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cuda test-browser chromium lab chapters goldens export docs audit coverage clean
BIN := .venv/bin
# The environment is rebuilt when the requirements (or the folder's place) change; otherwise a second run starts at once.
STAMP := .venv/.setup-$(shell (pwd; cat settings.ini setup.py) | cksum | cut -d' ' -f1)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
PORTRAIT ?= $(firstword $(sort $(wildcard data/*.png)))
RUN := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

help: ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## bring .venv up to date (the other targets do this first)

$(STAMP):
	@$(BIN)/python -c '' 2>/dev/null || { test -n "$(PYTHON)" || { \
		echo "expected Python 3.11 to 3.13 with its venv module on the PATH (or make PYTHON=/path/to/python), found none"; exit 1; }; \
		$(PYTHON) -m venv --clear .venv; }
	@echo "setup: installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -e '.[dev,notebooks]'
	@for there in nbs nbs/tutorials; do cp "$$($(BIN)/python -c 'import pathlib, plotly; print(pathlib.Path(plotly.__file__).parent)')/package_data/plotly.min.js" $$there/; done  # for the site
	@rm -f .venv/.setup-* && touch $@

demo: setup ## invert a portrait with the shipped generator: make demo [PORTRAIT=face.png]
	@test -n "$(PORTRAIT)" || { echo "expected a portrait in data/, found none"; exit 1; }
	$(BIN)/posefree invert "$(PORTRAIT)" --out out/demo --overwrite
	@file=$$(basename "$(PORTRAIT)") && echo && echo "The pictures are in out/demo/$${file%.*}/ (open comparison.png first):" && ls "out/demo/$${file%.*}"

test: setup ## library and notebooks agree, every notebook runs by papermill and keeps its figures, pytest (in a browser too, where Chromium is installed)
	@rc=0; $(RUN) $(BIN)/python tests/tools/agree.py || rc=1; $(RUN) $(BIN)/python tests/notebooks/run.py || rc=1; \
		$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup tests || rc=1; exit $$rc

test-cuda: setup ## on a CUDA machine: every notebook with the real settings, CPU against CUDA, bf16, memory, the same twice (elsewhere: skipped, and said)
	@rc=0; $(RUN) $(BIN)/python tests/notebooks/run.py --profile cuda || rc=1; $(RUN) $(BIN)/python -m pytest tests/notebooks/test_cuda.py || rc=1; exit $$rc

test-browser: chromium setup ## open the site, and drive the cockpit in JupyterLab, by Chromium, which is installed first on Debian
	$(RUN) $(BIN)/python -m pytest -s tests/browser tests/test_site.py

chromium: ## install Chromium, where it is missing, on Debian
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		command -v apt-get >/dev/null || { echo "expected Chromium on the PATH, or apt-get to install it with"; exit 1; }; \
		as=$$([ "$$(id -u)" = 0 ] || echo sudo); export DEBIAN_FRONTEND=noninteractive; \
		$$as apt-get update -qq -o Acquire::Retries=1 && $$as apt-get install -y -qq chromium; }

lab: setup ## read and run everything in JupyterLab, from the quick tour on
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/nbs/tutorials/quick_tour.ipynb

chapters: setup ## execute the chapters in place and keep their pictures: make chapters [NAMES="01_camera 05_generator"]
	$(RUN) $(BIN)/python tests/tools/chapters.py --save $(NAMES)
	@$(BIN)/python tests/tools/readme.py

goldens: setup ## accept the figures that the notebooks give now, which executes them in place: make goldens [NAMES="12_optimiser"]
	$(RUN) $(BIN)/python tests/notebooks/run.py --renew $(NAMES)
	@$(BIN)/python tests/tools/readme.py

export: setup ## notebooks -> posefree_kit/*.py and README.md, after an edit
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tests/tools/readme.py

docs: setup ## the site in _docs/: by Quarto where it is installed, by pandoc otherwise
	$(BIN)/python tests/tools/docs.py

audit: setup ## known holes in the versions of requirements-lock.txt (asks the advisory database: needs the network)
	$(BIN)/pip-audit --strict -r requirements-lock.txt --no-deps --disable-pip

coverage: setup ## how many of the library's lines tests and chapters run, at least 90 % (twice as long as `make test`)
	$(BIN)/coverage erase
	@rc=0; $(RUN) $(BIN)/coverage run tests/tools/chapters.py || rc=1; $(RUN) $(BIN)/coverage run -m pytest -n 2 --dist loadgroup tests || rc=1; \
		$(BIN)/coverage combine -q && $(BIN)/coverage report --fail-under=90 || rc=1; exit $$rc

clean: ## remove what was built (not .venv)
	rm -rf _proc _docs out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.* nbs/nbdev.yml nbs/plotly.min.js nbs/tutorials/plotly.min.js nbs/.last_checked
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
