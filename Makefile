# `make demo` and `make test` do their own set-up, in .venv, the first time; either may be repeated.
# Needed: make, a C compiler, Python 3.11 or newer with venv, and a package index that pip reaches.
# Another Python than the first that fits: make demo PYTHON=/path/to/python3

CANDIDATES = python3 python3.11 python3.12 python3.13 python
PYTHON =
VENV = .venv
# a process of the tests for each CPU that we may use, 8 at the most; each computes in one thread
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -lt 8 ] && echo $$n || echo 8)
RUN = $(VENV)/bin/python

# install anew when pyproject.toml changes, or the clone moves (the install holds its path)
KEY := $(shell { cat pyproject.toml; pwd; } | cksum | cut -d ' ' -f 1)
FOR_DEMO = $(VENV)/.installed-demo-$(KEY)
FOR_TEST = $(VENV)/.installed-test-demo-$(KEY)
# a .venv whose Python is gone (upgraded away, say) holds nothing
$(shell [ -x $(RUN) ] || rm -f $(VENV)/.installed-*)

.NOTPARALLEL:
.PHONY: help demo test check lint clean

help:
	@echo "make demo    tune a small model on real biomedical text; scores before and after"
	@echo "make test    run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make check   make lint, then make test: what a change must pass"
	@echo "make clean   remove what these made (.venv, build products, caches); runs/ stays"

demo: $(FOR_DEMO)
	@echo "running the demo: $(RUN) train/main.py"
	@$(RUN) train/main.py

test: $(FOR_TEST)
	@echo "running the tests: $(RUN) -m pytest, $(WORKERS) processes"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs --durations=10 -n $(WORKERS) --dist loadfile

check: lint test

lint: $(FOR_TEST)
	@echo "running ruff and mypy"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist bioinstruct.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@python=; for name in $(or $(PYTHON),$(CANDIDATES)); do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	    >/dev/null 2>&1; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "no Python 3.11 or newer with venv among: $(or $(PYTHON),$(CANDIDATES)); install one" \
	    "(Debian, Ubuntu: python3 and python3-venv) or say make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	$$python -m venv --clear $(VENV)

$(FOR_DEMO): $(RUN)
	@$(call install,demo)
	@touch $@

$(FOR_TEST): $(RUN)
	@$(call install,test$(comma)demo)
	@touch $(FOR_DEMO) $@

comma = ,

# install the project into .venv, editable, with the extras $(1)
define install
echo "installing torch and the rest into $(VENV) (once; about 2 GB, more with CUDA; minutes) ..."; \
rm -f $(VENV)/.installed-*; \
$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip >/dev/null; \
$(RUN) -m pip install -qq --disable-pip-version-check --no-input --editable ".[$(1)]" || { \
  echo "pip could not install it all (see above); it needs a package index that it can reach" >&2; \
  exit 1; \
}; \
echo "installed"
endef
