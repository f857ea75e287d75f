# make bench    compares normops with torch on this machine and trains two networks on real data
# make test     builds and runs the test suite
# make test-models    converts models of transformers, diffusers and monai, and compares them with themselves
#
# All three set up everything they need in a virtual environment first; a second run rebuilds only what changed.
#
#   PYTHON=python3.12       the interpreter of the virtual environment
#   TORCH=torch==2.14.1     the torch to install in it
#   VENV=                   no virtual environment: use PYTHON as it is, and install nothing

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BENCH_ARGS ?=
TEST_ARGS ?=

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
CLANG_FORMAT := clang-format
ENVIRONMENT :=
else
RUN := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
ENVIRONMENT := $(VENV)/.ready-$(notdir $(PYTHON))-$(subst =,,$(TORCH))
endif

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: bench test test-models build lint format package clean

bench: build
	$(RUN) -m bench $(BENCH_ARGS)

test: build
	$(RUN) -m pytest $(TEST_ARGS)

test-models: build
ifneq ($(ENVIRONMENT),)
	$(RUN) -m pip install --quiet --group models
endif
	$(RUN) -m pytest tests/models $(TEST_ARGS)

# The compiler is asked each time: ninja knows better than make what a changed header touches.
build: $(ENVIRONMENT)
	$(RUN) setup.py --quiet build_ext --inplace

ifneq ($(ENVIRONMENT),)
$(ENVIRONMENT): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --group build --group test --group bench --group lint
	touch $@
endif

lint: $(ENVIRONMENT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

format: $(ENVIRONMENT)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

# Installs as a user would, from a source archive and out of reach of the source tree, and asks the package what it is.
package: $(ENVIRONMENT)
	rm -rf build/dist build/installed
	$(RUN) -c "from setuptools.build_meta import build_sdist; build_sdist('build/dist')"
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --target build/installed build/dist/*.tar.gz
	cd build/installed && PYTHONPATH=. $(abspath $(RUN)) -m normops

clean:
	rm -rf build dist *.egg-info normops/*.so .venv
