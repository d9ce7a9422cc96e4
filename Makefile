# make demo   trains the main job on real data inside its memory budget
# make test   runs the tests
# Both first make .venv: with the torch that $(PYTHON) can import, if there is one, else with the pinned one.
# Variables: PYTHON, CXX, TORCH (what pip installs as torch), ARGS (for sparsenet train, or for pytest).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard README.md) \
  $(shell find csrc sparsenet -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.installed
	$(BIN)/sparsenet train $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

clean:
	rm -rf $(VENV) build

$(VENV)/torch.installed:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "sparsenet needs Python 3.10 or newer: there is no $(PYTHON); set PYTHON" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("sparsenet needs Python 3.10 or newer: $(PYTHON) is %s; set PYTHON" % sys.version.split()[0])'
	@for compiler in "$$CXX" c++ g++ clang++; do command -v "$$compiler" >/dev/null 2>&1 && break; done; \
	printf '#include <span>\nint main() { return int(std::span<int>().size()); }\n' | \
	"$$compiler" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || \
	{ echo "sparsenet needs a C++20 compiler (g++ 11, clang++ 14 or newer): $$compiler is none or not there; set CXX" >&2; exit 1; }
	@rm -rf $(VENV)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet '$(TORCH)'; \
	fi || { echo "sparsenet could not make $(VENV) with torch: see above (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/%.installed: $(VENV)/torch.installed $(SOURCES)
	$(BIN)/pip install --quiet '.[$*]'
	@touch $@
