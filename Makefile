# Each target is one command on a fresh machine: it makes its own virtual environment first.
#   make demo     find tickets on one picture, restore a second one with them
#   make test     every test
#   make check    format, lint, types
#   make test-gpu-static   what nvcc makes of the GPU kernels; needs nvcc, no GPU
#   make test-gpu, bench-gpu   test and time them on a GPU; results in gpu-tests.xml, gpu-bench.jsonl
#   make sanitize C++ kernel tests under AddressSanitizer and UBSan, then AVX-512 emulated under valgrind
# Where pip's default index has no CPU wheel of torch, name one that has: make test PIP_FLAGS="--extra-index-url URL"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
BIN := $(VENV)/bin
CXX_FILES = $(shell find csrc tests \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: demo test sanitize test-gpu-static test-gpu bench-gpu gpu-tables check format clean

demo: $(VENV)/installed
	$(BIN)/lipfast demo --out demo

# A process for each core. Waiting threads of torch sleep, or they would take the cores from other processes.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --benchmark-disable

# Sanitizers' checks take longer to optimise than to run. valgrind knows no AVX-512; emulated, those kernels run on CPUs without it, too.
sanitize: $(VENV)/installed
	$(BIN)/python tests/cpp/build.py build/sanitize/kernels -fsanitize=address,undefined -fno-sanitize-recover=all -O0
	build/sanitize/kernels
	LIPFAST_ISA=avx512 $(BIN)/python tests/cpp/build.py build/valgrind/kernels --emulate-avx512
	LIPFAST_ISA=avx512 valgrind -q --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite --show-leak-kinds=definite build/valgrind/kernels

test-gpu-static: $(VENV)/installed
	$(BIN)/python -m pytest tests/gpu -m nvcc

# With TORCH naming a CUDA build of torch, on a machine with nvcc and a GPU.
$(VENV)/cuda: $(VENV)/installed $(wildcard csrc/cuda/*)
	$(BIN)/python csrc/cuda/build.py lipfast/_cuda.so
	touch $@

test-gpu: $(VENV)/cuda
	LIPFAST_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu/test_triton.py tests/gpu/test_networks.py tests/gpu/test_on_gpu.py -m 'gpu or not nvcc' --junitxml=gpu-tests.xml

bench-gpu: $(VENV)/cuda
	$(BIN)/python benchmarks/bench_gpu.py gpu-bench.jsonl

# After a wanted change of a GPU kernel.
gpu-tables: $(VENV)/cuda
	cd tests/gpu/tools && PYTHONPATH=$(CURDIR) $(abspath $(BIN))/python tables.py triton
	cd tests/gpu/tools && $(abspath $(BIN))/python tables.py cuda $(CURDIR)/lipfast/_cuda.so

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --style=file --dry-run -Werror $(CXX_FILES))

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(CXX_FILES),$(BIN)/clang-format --style=file -i $(CXX_FILES))

clean:
	rm -rf $(VENV) build dist lipfast.egg-info demo

# torch comes first and pinned, so that pip settles on its CPU wheel before it resolves the rest. Byte code is made of
# what is imported, when it is: all of torch's would take as long as the download.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile $(PIP_FLAGS) '$(TORCH)'
	touch $@

# Editable: the extension is compiled in place. A changed source or build file installs again.
$(VENV)/installed: $(VENV)/torch pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)
	$(BIN)/pip install --quiet --no-compile $(PIP_FLAGS) --editable '.[dev]'
	touch $@
