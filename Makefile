# Two virtual environments, made on first use and renewed when what they hold changes: the demo
# installs the package as a user would, the tests install it editable with its tools.

PYTHON ?= python3
PYTEST_ARGS ?=
# Test files at a time. More would fight for the cores that torch uses.
WORKERS ?= 2
# A run in CI tells where its time went.
SLOWEST := $(if $(CI),--durations=30)
DEMO := .venv-demo
DEV := .venv
PIP_INSTALL := -m pip --disable-pip-version-check install --constraint constraints.txt

DEMO_RUN := runs/demo
BASELINE_RUN := runs/demo-fp16
DEMO_TEXT := ssdi8_edge/demo
PROMPT := The old man looked at the sea and

# What a wheel is made from: the demo is installed again when any of it changes.
SOURCES := $(shell find ssdi8_edge jetson plugins profiles -type f \
	-not -path '*/__pycache__/*' -not -path '*/build/*')

.PHONY: help demo test check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    build, verify, run and evaluate the shipped model"
	@echo "make test    the test suite; PYTEST_ARGS='-k name' narrows it, WORKERS=0 is one process"
	@echo "make check   formatting, lint, types, import rule"
	@echo "make clean   remove environments, runs and caches"
	@echo "PYTHON=python3.12 chooses the interpreter of a new environment"

demo: $(DEMO)/installed
	@mkdir -p runs
	@echo "--- calibrate, quantize, export and pack the demo model for host-cpu"
	@# A part of the text that ships: enough for a demo, and done in a minute.
	@head -n 250 $(DEMO_TEXT)/calibration.txt > runs/demo-calibration.txt
	$(DEMO)/bin/ssdi8-edge build --model demo --target host-cpu --method edge-w8a8 \
		--calibration runs/demo-calibration.txt --out $(DEMO_RUN)
	@echo "--- the same model unquantized, to compare with"
	$(DEMO)/bin/ssdi8-edge build --model demo --target host-cpu --method fp16 \
		--calibration runs/demo-calibration.txt --out $(BASELINE_RUN)
	@echo "--- check every file and the golden vectors"
	$(DEMO)/bin/ssdi8-edge verify $(DEMO_RUN)
	@echo "--- generate"
	@printf '%s' "$(PROMPT)"
	@$(DEMO)/bin/ssdi8-edge run $(DEMO_RUN) --prompt "$(PROMPT)" --max-new-tokens 48 \
		--temperature 0.7 --top-k 40 --seed 1
	@echo "--- perplexity on text that the model never saw, against FP16"
	$(DEMO)/bin/ssdi8-edge evaluate $(BASELINE_RUN) $(DEMO_RUN) \
		--text $(DEMO_TEXT)/evaluation.txt --limit 4
	@echo "--- done; the bundle and its size in bytes:"
	@du --apparent-size --block-size=1 --summarize $(DEMO_RUN)/bundle

test: $(DEV)/installed
	OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(SLOWEST) $(PYTEST_ARGS)

check: $(DEV)/installed
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

clean:
	rm -rf $(DEMO) $(DEV) runs build dist
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find ssdi8_edge jetson tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO)/installed: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP_INSTALL) .
	@touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP_INSTALL) --editable '.[test,check,eval]'
	@touch $@
