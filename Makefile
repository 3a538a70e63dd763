# make demo | make test are the two commands to know; each makes the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extra flags for pip, such as where to find a CPU build of torch.
PIP_FLAGS ?=
# One thread a worker: two workers of two threads each are slower than two of one on two cores.
# (pytest-benchmark warns beside pytest-xdist, and warnings are errors: it has its own target.)
TEST_FLAGS ?= -n 2 -p no:benchmark
DEMO_FLAGS ?=
RESULTS_FLAGS ?=
ABLATION_FLAGS ?=
CHECK_FLAGS ?=
# The other Triton that kernels are compiled with: a folder that goes before the environment's packages.
TRITON39 ?= .venv-triton39

STAMP := $(VENV)/.mtl_fast-env
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help env native demo test sanitize results docs docs-pictures lint types bench clean soak shipped-model ablation gpu-proof gpu-check kernel-report kernel-budgets

help:
	@echo "make demo      pre-train, meta-train with and without hard tasks, evaluate, report (minutes)"
	@echo "make test      all tests"
	@echo "make soak      every phase killed at 100 random moments and gone on with (minutes)"
	@echo "make results   the demo with three seeds at full length: the README's table and pictures"
	@echo "make ablation  every row of the paper's ablation: table, claims and convergence figure (hours; --plan tells)"
	@echo "make bench     microbenchmarks of each operation (python -m bench: beside the best of plain PyTorch)"
	@echo "make shipped-model  train and pack the model that the package ships for Glyphs (minutes)"
	@echo "make sanitize  the native kernels' tests under address and undefined-behaviour sanitizers"
	@echo "make docs      the pages and the reference, into build/docs/index.html"
	@echo "make gpu-proof      compile every GPU kernel for every chip with both versions of Triton, and gate it (no GPU needed; an hour after a change)"
	@echo "make kernel-report  what each GPU kernel takes of each chip, its modelled time, launches of a whole step"
	@echo "make gpu-check      on a machine with an NVIDIA GPU: correctness, times, one report; elsewhere a dry run"
	@echo "make lint | types | native | env | clean"
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) PIP_FLAGS= TEST_FLAGS=$(TEST_FLAGS) DEMO_FLAGS="

env: $(STAMP)

# The stamp is written last: an interrupted run starts over, a finished one is not repeated.
$(STAMP): requirements/test.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mtl_fast needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements/test.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# Compiles what changed since the last time, for this processor; without a compiler it says so and all goes on.
native: env
	$(BIN)/mtl-fast build --optional

demo: native
	$(BIN)/mtl-fast demo --output runs/demo --resume $(DEMO_FLAGS)

# Twice: kernels are interpreted or compiled, which is settled when Triton is imported.
test: native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TEST_FLAGS) tests/gpu/interpreted

# What is killed runs on one thread, so that the bits depend on no other work of the machine.
soak: native
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.soak $(SOAK_FLAGS)

# The sanitizer's runtime has to come first in the process, and finds the C++ runtime's symbols only if that is there
# too. Leaks are not looked for: the interpreter and torch keep memory to the end of the process.
sanitize: env
	library=$$(CXX="$(CXX)" $(BIN)/mtl-fast build --sanitize --quiet) && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 MTL_FAST_LIBRARY=$$library \
	$(BIN)/python -m pytest -p no:benchmark -p no:cacheprovider $(SANITIZE_FLAGS) tests/ops/test_*native*.py tests/ops/test_task_conv.py

results: native
	$(BIN)/mtl-fast results $(RESULTS_FLAGS)
	$(BIN)/python tools/update_readme.py

# The pages of docs/ and the reference from the docstrings, into build/docs; a warning is an error.
docs: env
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements/docs.txt
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# Runs the snippets of the tutorial and draws its pictures.
docs-pictures: env
	$(BIN)/python tools/tutorial_pictures.py

shipped-model: native
	$(BIN)/python tools/ship_model.py

# Meta learning rates are those that `make results` chose on the validation split.
ablation: native
	$(BIN)/mtl-fast ablation --preset glyphs --rates docs/results/results.json $(ABLATION_FLAGS)
	$(BIN)/python tools/update_readme.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

bench: native
	$(BIN)/python -m pytest bench/ops --benchmark-columns=min,median,rounds

# A folder of its own, for an environment holds one version; torch and all else are the environment's.
$(TRITON39)/.stamp: requirements/triton39.txt | env
	@rm -rf $(TRITON39)
	@$(BIN)/python -m pip install --quiet --no-deps $(PIP_FLAGS) --target $(TRITON39) -r $< || \
	  { echo "gpu-proof: $$(tail -n 1 $<) cannot be had, and kernels are to be proven with it as well" >&2; exit 1; }
	@touch $@

# Kernels of both versions, and with the second the execution of its assembly: `make test` does the first's.
# What passed is kept in bench/results/gpu-proof.json; commit it with the change that was proven.
gpu-proof: env $(TRITON39)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.gpu_proof
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON39) $(BIN)/python -m tools.gpu_proof --tests tests/gpu/execution

kernel-budgets: env $(TRITON39)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.kernel_budgets
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON39) $(BIN)/python -m tools.kernel_budgets

kernel-report: env
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.kernel_report

gpu-check: env
	$(BIN)/python -m tools.gpu_check $(CHECK_FLAGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find mtl_fast kernels bench examples tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
