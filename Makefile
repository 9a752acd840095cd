# make demo      set everything up and run the main job
# make test      set everything up and run lint and tests
# make sanitize  the ops' tests on a CPU library with AddressSanitizer and UndefinedBehaviorSanitizer (g++)
#
# TEST_JOBS      processes that run the tests, 2 by default
# TORCH          what to install as torch, "torch==2.13.0" by default
# TORCH_INDEX    package index for torch alone, such as https://download.pytorch.org/whl/cpu
# PYTHON         Python 3.11 or newer, "python3" by default
# VENV           where the virtual environment is made, ".venv" by default

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TRITON ?= triton==3.7.1
CLANG ?= ziglang==0.17.1
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
STAMPS := $(VENV)/.stamps
# Every later install is held to the torch that is there, so that none of them fetches another.
HELD := -c $(STAMPS)/torch.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.DELETE_ON_ERROR:
.PHONY: install demo test lint format bench triton clang sanitize clean distclean

demo: install
	$(PY) -m flowkernels demo $(DEMO_ARGS)

test: lint $(STAMPS)/probes
	@$(MAKE) --no-print-directory triton || echo "Triton cannot be installed here: the tests of its kernels are skipped"
	@$(MAKE) --no-print-directory clang || echo "clang cannot be installed here: whether it takes the sources is not tested"
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS) python_tests

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install
	$(PY) -m benchmarks $(BENCH_ARGS)

install: $(STAMPS)/installed

$(STAMPS)/installed: $(STAMPS)/$(TORCH) $(SOURCES)
	@echo "building flowkernels ..."
	$(PIP) install $(HELD) --no-build-isolation -e ".[test,demo,bench]"
	@touch $@

$(STAMPS)/$(TORCH): | $(PY)
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/*
	@echo "installing $(TORCH) ..."
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(STAMPS)/torch.txt
	$(PIP) install $(HELD) "setuptools>=77" ninja numpy
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flowkernels needs Python 3.11 or newer: install it, or name it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

# What the tests alone call: the vector mathematics, the CUDA loop's twin, and the CUDA kernels for a CPU.
$(STAMPS)/probes: $(STAMPS)/installed
	@echo "building the tests' library ..."
	FLOWKERNELS_TESTS=1 $(PY) setup.py -q build_ext --inplace
	@touch $@

# Triton's kernels are tested in its interpreter, which needs no GPU. A torch with CUDA has brought its own.
triton: $(STAMPS)/triton

$(STAMPS)/triton: $(STAMPS)/installed
	$(PY) -c 'import triton' 2> /dev/null || $(PIP) install $(HELD) "$(TRITON)"
	@touch $@

# clang for Linux and macOS, with the headers of both: whether it takes the sources is tested, no code is made.
clang: $(STAMPS)/clang

$(STAMPS)/clang: $(STAMPS)/installed
	$(PIP) install $(HELD) "$(CLANG)"
	@touch $@

# In a copy of the tree, so that neither build disturbs the other. Memory that kernels leave unwritten is NaN there (FK_FILL_NAN). What
# Python does around the ops (compile, opcheck, functorch) meets no other memory, and takes long under the sanitizers. With
# SANITIZE_DEFINES="-DFK_FILL_NAN -DFK_NARROW_VECTORS", on vectors as short as NEON's, with -DFK_WIDE_VECTORS as long as AVX-512's, which this
# machine may not have; the latter takes ten minutes to build.
SANITIZERS := -fsanitize=address,undefined
SANITIZE_DEFINES ?= -DFK_FILL_NAN
SANITIZE_ARGS ?= -k "not compil and not opcheck and not functorch and not autocast and not test_calls"
sanitize: install
	@mkdir -p build/sanitize && cd build/sanitize && rm -rf csrc flowkernels python_tests
	tar --exclude='*.so' --exclude=_build.json -cf - csrc flowkernels python_tests setup.py pyproject.toml README.md LICENSE | tar -xf - -C build/sanitize
	cd build/sanitize && CFLAGS="$(SANITIZERS) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g $(SANITIZE_DEFINES)" \
	  LDFLAGS="$(SANITIZERS)" FLOWKERNELS_SKIP_CUDA=1 FLOWKERNELS_TESTS=1 FLOWKERNELS_WERROR= $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell g++ -print-file-name=$(lib)))" \
	  OMP_WAIT_POLICY=passive $(abspath $(PY)) -m pytest -q -n $(TEST_JOBS) --dist worksteal -p no:cacheprovider $(SANITIZE_ARGS) python_tests/ops python_tests/cuda

clean:
	rm -rf build dist *.egg-info flowkernels/_build.json flowkernels/*.so python_tests/*.so $(STAMPS)/installed $(STAMPS)/probes

distclean: clean
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
