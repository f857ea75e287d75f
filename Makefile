# make bench    compares normops with torch on this machine and trains two networks on real data
# make test     builds and runs the test suite
# make test-models    converts models of transformers, diffusers and monai, and compares them with themselves
# make cuda     compiles the CUDA kernels, card or no card
# make gpu      builds, tests and measures on the card at hand
#
# All set up everything they need in a virtual environment first; a second run rebuilds only what changed.
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

CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: bench test test-models build cuda gpu lint format package clean

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

# What needs a card, within 9 minutes: build for it, tests on it, compute-sanitizer, benchmark. Installs nothing if VENV=.
gpu: $(ENVIRONMENT)
	$(RUN) tests/cuda/gpu.py

# Compiles and links the CUDA kernels, whether or not torch and this machine have CUDA, loads the library, and compares
# what the kernels take of a multiprocessor with the table in tests/cuda.
CUDA_ARCHITECTURES ?= 8.0 9.0 10.0
cuda: $(ENVIRONMENT)
	NORMOPS_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" $(RUN) setup.py --quiet \
	    build --build-lib build/cuda/lib build_ext --build-temp build/cuda/temp
	cd build/cuda/lib && $(abspath $(RUN)) -m normops
	$(RUN) tests/cuda/resources.py build/cuda/temp

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
