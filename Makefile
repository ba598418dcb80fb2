# make demo       trains, evaluates and queries a small model, in minutes on a CPU
# make test       every test that needs no GPU; compiles the `ci` kernels where nvcc is found
# make gpu-test   every GPU test, then compute-sanitizer over every kernel
# make bench      every benchmark; rows are appended to benchmarks/results
#
# Each makes .venv first. OFFLINE=1 takes the machine's own python, torch and build tools instead, asks no package index,
# and installs into build/site.

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
OFFLINE ?= 0
# CMake definitions for every install: make test DEFINES="CUTLASS_DIR=/opt/cutlass HSTU_EXT_ARCHS=90"
DEFINES ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=

ifeq ($(OFFLINE),1)
STATE := build/site
PY := PYTHONPATH=$(CURDIR)/$(STATE) $(PYTHON)
else
STATE := .venv
PY := $(STATE)/bin/python
endif

SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc python third_party tools/codegen -type f \
    -not -path '*/__pycache__/*' 2>/dev/null)
DEFINES_cpu := HSTU_EXT_CUDA=off
DEFINES_ci := HSTU_EXT_SET=ci
DEFINES_default := HSTU_EXT_SET=default
DEFINES_full := HSTU_EXT_SET=full
# The kernels to install: KERNELS, else what is installed already (for the demo), else what the target asks for.
HAVE := $(patsubst $(STATE)/installed-%,%,$(firstword $(wildcard $(STATE)/installed-*)))

CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: demo test check format test-build gpu-test bench clean
.DELETE_ON_ERROR:
export PYTHONUNBUFFERED := 1
# torch's idle CPU threads sleep instead of spinning: several times faster wherever other work shares the cores.
demo test test-build: export OMP_WAIT_POLICY ?= passive

demo: $(STATE)/installed-$(or $(KERNELS),$(HAVE),cpu)
	$(PY) examples/demo.py

# Tests use one thread each, so they run beside one another.
test: check
	$(PY) -m pytest $(if $(filter 1,$(OFFLINE)),,-n auto) -m "not gpu and not slow" $(TEST_FLAGS)

check: $(STATE)/installed-$(or $(KERNELS),ci)
ifneq ($(OFFLINE),1)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(STATE)/bin/clang-format --dry-run -Werror $(CPP)
endif

format: $(STATE)/installed-$(or $(KERNELS),$(HAVE),cpu)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(STATE)/bin/clang-format -i $(CPP)

test-build: $(STATE)/installed-$(or $(KERNELS),ci)
	$(PY) -m pytest -m slow $(TEST_FLAGS)

gpu-test: $(STATE)/installed-$(or $(KERNELS),default)
	$(PY) -m pytest -m gpu $(TEST_FLAGS)
	$(PY) tests/run_sanitizer.py

bench: $(STATE)/installed-$(or $(KERNELS),default)
	for file in benchmarks/bench_*.py; do $(PY) $$file $(BENCH_FLAGS) || exit 1; done

clean:
	rm -rf .venv build

# One install at a time lies in $(STATE); its name says which kernels it has.
$(STATE)/installed-%: $(SOURCES) | $(STATE)/ready
	rm -f $(STATE)/installed-*
ifeq ($(OFFLINE),1)
	$(PYTHON) -m pip install -v . --no-build-isolation --no-deps --no-index --upgrade --target $(STATE) \
	    $(foreach define,$(DEFINES_$*) $(DEFINES),--config-settings='cmake.define.$(define)')
else
	$(PY) -m pip install -v ".[train,test,dev]" $(foreach define,$(DEFINES_$*) $(DEFINES),--config-settings='cmake.define.$(define)')
endif
	touch $@

.venv/ready:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install "$(TORCH)"
	touch $@

build/site/ready:
	mkdir -p build/site
	touch $@
