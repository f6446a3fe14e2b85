# `make demo` and `make test` need Python 3.11+ and a C++ compiler; the environment is made in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOX ?= build/nox
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu')

# OpenMP threads that spin at barriers make a busy machine several times slower.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

VENV_DOCS := $(VENV)/.docs

.PHONY: demo test docs matrix lint gate mutate sanitize processes bench bench-gpu install clean

demo: install
	rm -rf runs/demo
	$(BIN)/uvc compress --data digits --budget 0.5 --out runs/demo

# One thread per test, so that as many run at a time as there are cores, at most four.
test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4

# The tests with the oldest and the newest supported versions, each set in an environment of its own that is
# deleted after it; see noxfile.py. ARGS="-s oldest -- tests/kernels" runs one set and a part.
matrix:
	test -x $(NOX)/bin/nox || { $(PYTHON) -m venv $(NOX) && $(NOX)/bin/python -m pip install --quiet "nox>=2024.4"; }
	$(NOX)/bin/nox --envdir $(NOX)/sessions $(ARGS)

# The site of documentation, in build/docs; a warning is an error.
docs: $(VENV_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --site-dir build/docs

$(VENV_DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[docs]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without a GPU: what the machine code of csrc/cuda's attention says of its speed, beside the stored table; then
# every kernel is compiled for GPUs that are not here: registers, spills, shared memory, tensor cores.
gate: install
	$(BIN)/python -m uvc_kernels.compile_check.static || test $$? = 2
	$(BIN)/python -m uvc_kernels.compile_check

# Deletes each barrier, wait and guard of csrc/cuda in turn: a test of the host build must notice.
mutate: install
	$(BIN)/python tests/kernels/mutate.py

# The C++ and the host build of CUDA, slow tests too, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: install
	UVC_SANITIZE=1 $(BIN)/python setup.py build_ext --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	cp -r kernels/*.py kernels/packed kernels/triton build/sanitize/lib/uvc_kernels/
	cp -r uvc build/sanitize/lib/
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -s -m "" --timeout 3000 tests/kernels \
	-k "not triton and not cuda_compile"

# Several processes: kills, drawn configurations, memory over 2,000 steps, traffic, inductor; then the digits recipe
# by two processes beside one. An hour on two cores.
processes: install
	$(BIN)/python -m pytest -s -m "" --timeout 3600 $(addprefix tests/training/test_,\
	processes.py fsdp.py checkpoints.py compiling.py interrupted.py)
	$(BIN)/python bench/processes.py build/processes

# Adds rows to bench/results and prints a table of speed-ups.
bench: install
	$(BIN)/python -m pytest bench --benchmark-disable-gc

# For a bare GPU machine without a network: the Python that is there, nothing installed. OUT names the folder.
# REST=1 runs what does not fit into its nine minutes.
bench-gpu:
	$(PYTHON) bench/gpu.py $(if $(OUT),--out "$(OUT)") $(if $(REST),--rest)

install: $(STAMP)

# torch goes in first: the extension is built against the torch that will load it, without build isolation.
$(STAMP): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja "torch>=2.10" "timm>=1.0.26"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.so
