# make bench    compares normops with torch on this machine and trains two networks on real data
# make bench-models    the same inside of models of transformers, diffusers and monai; takes ten minutes
# make test     builds and runs the test suite
# make test-models    converts models of transformers, diffusers and monai, and compares them with themselves
# make docs     the documentation as HTML, in build/docs
# make dev      builds for this machine's instruction set alone, which is faster, to try a change
# make cuda     compiles the CUDA kernels, card or no card
# make gpu      builds, tests and measures on the card at hand
# make dist     a source archive and a wheel, installed and tried
# make test-torches    builds and tests with every torch from 2.11 on; takes an hour and 20 GB
# make mutants  plants small faults, one at a time, which the tests have to catch
# make sanitize    the CPU library under AddressSanitizer and UndefinedBehaviorSanitizer
# make fuzz-kernels, sanitize-kernels, race-kernels    its kernels under libFuzzer (clang), and called at random under
#               the sanitizers of addresses and of threads
# make big      tensors of more than 2^31 elements; takes up to 13 GiB
# make side-by-side    one training with torch's layers and with those of normops, for TRAINING_SECONDS (ten minutes)
# make fuzz     the property tests with ever new examples, for FUZZ_SECONDS (an hour)
# make nightly  what is too much for every commit
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
MUTANTS ?=

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

.PHONY: bench bench-models docs test test-models test-torches build dev sanitize fuzz-kernels sanitize-kernels race-kernels side-by-side cuda cuda-clang gpu lint format package dist mutants fuzz big nightly clean

bench: build
	$(RUN) -m bench $(BENCH_ARGS)

bench-models: build
ifneq ($(ENVIRONMENT),)
	$(RUN) -m pip install --quiet --group models
endif
	$(RUN) -m bench models $(BENCH_ARGS)

# Warnings are errors. What the pages say is checked by tests/test_docs.py.
docs: build
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

# One process for each core, whose threads do not spin while they wait: there are more of them than cores.
test: build
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --dist worksteal $(TEST_ARGS)

test-models: build
ifneq ($(ENVIRONMENT),)
	$(RUN) -m pip install --quiet --group models
endif
	$(RUN) -m pytest tests/models $(TEST_ARGS)

# Torch finds the backend of torch.compile by what egg_info writes. The compiler is asked each time: ninja knows better than make what a changed header touches.
build: $(ENVIRONMENT)
	$(RUN) setup.py --quiet egg_info build_ext --inplace

dev: $(ENVIRONMENT)
	NORMOPS_INSTRUCTION_SETS=native NORMOPS_CUDA=0 $(RUN) setup.py --quiet egg_info build_ext --inplace

# Files and options for pytest; all tests of numbers by default.
SANITIZE_ARGS ?=
sanitize: $(ENVIRONMENT)
	$(RUN) tests/sanitize.py $(SANITIZE_ARGS)

fuzz-kernels: FUZZ_SECONDS ?= 600
fuzz-kernels: $(ENVIRONMENT)
	PYTHON=$(RUN) bash tests/kernels/build.sh fuzz
	mkdir -p build/kernels/corpus
	build/kernels/fuzz/driver -max_total_time=$(FUZZ_SECONDS) -max_len=64 -len_control=0 build/kernels/corpus

RANDOM_CALLS ?= 2000
sanitize-kernels: $(ENVIRONMENT)
	PYTHON=$(RUN) bash tests/kernels/build.sh random
	build/kernels/random/driver $(RANDOM_CALLS)

# At fixed addresses, without which older ThreadSanitizers do not start.
RACE_CALLS ?= 2000
race-kernels: $(ENVIRONMENT)
	PYTHON=$(RUN) bash tests/kernels/build.sh threads
	setarch -R build/kernels/threads/driver $(RACE_CALLS)

# What needs a card, within 9 minutes: build for it, tests on it, compute-sanitizer, benchmark. Installs nothing if VENV=.
gpu: $(ENVIRONMENT)
	$(RUN) tests/cuda/gpu.py

# Compiles and links the CUDA kernels, whether or not torch and this machine have CUDA, loads the library, and compares
# what the kernels take of a multiprocessor with the table in tests/cuda.
CUDA_ARCHITECTURES ?= 8.0 9.0 10.0
cuda: $(ENVIRONMENT)
	NORMOPS_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" $(RUN) setup.py --quiet build --build-lib build/cuda
	cd build/cuda && $(abspath $(RUN)) -m normops
	$(RUN) tests/cuda/resources.py build

# A second compiler reads the kernels: clang 22 or newer, and the headers of a CUDA toolkit. No warnings.
CLANG ?= clang++
cuda-clang: $(ENVIRONMENT)
	CLANG=$(CLANG) PYTHON=$(RUN) bash tests/cuda/clang.sh

ifneq ($(ENVIRONMENT),)
# A .pth file makes this source tree importable from any folder.
$(ENVIRONMENT): pyproject.toml
	@test -w . || { echo "make writes to $(CURDIR), which it may not: work on a copy of your own"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --group build --group test --group bench --group lint --group docs
	$(RUN) -c "import sysconfig; open(sysconfig.get_path('purelib') + '/normops-source.pth', 'w').write('$(CURDIR)\n')"
	touch $@
endif

lint: $(ENVIRONMENT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
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

# The wheel is tried in an environment that has torch and neither this source nor anything to build it with.
dist: $(ENVIRONMENT)
	rm -rf dist build/fresh
	$(RUN) -c "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('dist'); build_wheel('dist')"
	$(RUN) -m twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet "$(TORCH)"
	build/fresh/bin/python -m pip install --quiet dist/*.whl
	cd build/fresh && CXX=false bin/python -m normops

TORCHES ?= 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
test-torches:
	$(PYTHON) tests/torches.py $(TORCHES)

# All faults, or those that MUTANTS names; MUTANTS="5 3f2a" draws five by a seed, such as the hash of a commit.
mutants: build
	$(RUN) -m tests.mutants $(MUTANTS)

# Tensors and rows of more than 2^31 elements: up to 13 GiB, a case at a time.
big: build
	$(RUN) tests/big.py

TRAINING_SECONDS ?= 600
side-by-side: build
	$(RUN) tests/side_by_side.py $(TRAINING_SECONDS)

# TEST_ARGS="-k emulated" for the CUDA kernels alone.
fuzz: export FUZZ_SECONDS ?= 3600
fuzz: build
	$(RUN) tests/fuzz.py $(TEST_ARGS)

# All architectures, all instruction sets, another order of the tests, other numbers of threads.
nightly: build package dist
	$(MAKE) cuda CUDA_ARCHITECTURES="8.0 8.6 9.0 10.0 12.0"
	for set in default avx2; do ATEN_CPU_CAPABILITY=$$set $(RUN) -m pytest -n auto -k "not emulated" --ignore=tests/emulator || exit; done
	for threads in 1 3; do OMP_NUM_THREADS=$$threads $(RUN) -m pytest -p randomly -k "not emulated" --ignore=tests/emulator || exit; done
	$(RUN) -m pytest -m nightly
	$(RUN) -m bench accuracy --output build/accuracy
	$(MAKE) mutants
	$(MAKE) sanitize sanitize-kernels race-kernels fuzz-kernels
	$(MAKE) big side-by-side
	$(MAKE) fuzz
	$(MAKE) test-models

clean:
	rm -rf build dist *.egg-info normops/*.so .venv
