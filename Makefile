# Each target sets up .venv by itself, once; it is renewed when pyproject.toml changes. The demo needs the package alone,
# all others its extras as well. uv does it: that on the PATH, else one that pip brings; else pip.
PYTHON ?= python3
BIN := .venv/bin
# An exact pin gets a small CPU build where one is served; on a GPU machine: make TORCH=torch demo
TORCH ?= torch==2.13.0
SET_UP = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 is needed, this is {sys.version}")' \
	&& $(PYTHON) scripts/set_up.py

.PHONY: demo test check docs pictures package bench compatibility versions clean
.DEFAULT_GOAL := test

.venv/demo-ready: pyproject.toml
	@$(SET_UP) demo '$(TORCH)'
	@touch $@

.venv/ready: pyproject.toml
	@$(SET_UP) test '$(TORCH)' dev recipes
	@touch .venv/demo-ready $@

demo: .venv/demo-ready  ## dense against EST-DGM on real text: loss, seconds, joules, pictures
	$(BIN)/estdgm demo

test: .venv/ready  ## the whole test suite, warnings as errors
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

check: .venv/ready  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHONPATH=tests $(BIN)/python -m helpers.prose

docs: .venv/ready  ## the site, into build/site: warnings are errors, links are checked
	$(BIN)/python docs/_site/build.py

pictures: .venv/ready  ## the pictures of docs/pictures, from the package and from committed results
	$(BIN)/python docs/_site/pictures.py

package: .venv/ready  ## sdist and wheel, used from an environment of its own
	$(BIN)/python scripts/check_package.py '$(TORCH)'

bench: .venv/ready  ## ratios against dense on this machine: mask overhead, sparse products
	$(BIN)/estdgm bench overhead
	$(BIN)/estdgm bench kernels --quick

compatibility: .venv/ready  ## the tables of docs/guides/compatibility.md, printed from the tests' runs
	ESTDGM_WRITE_COMPATIBILITY=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/compatibility

versions: .venv/ready  ## the suite with the oldest admitted versions and with the newest; needs the network and an hour or more
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m helpers.versions

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
