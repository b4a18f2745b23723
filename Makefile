# make install | quickstart | sweep | ui | quick | test | soak | golden | mutants | lint | debian | peers
PYTHON ?= python3
UI_PORT ?= 5000
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install quickstart sweep ui quick test soak golden mutants lint format debian clean peers

install: $(STAMP)

# A half-made environment has no stamp and is finished by the next call; a changed lock or pyproject brings it up to date.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 13) else f"Python {v[0]}.{v[1]} found, 3.10 to 3.12 needed: make install PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $(STAMP)

quickstart: install
	$(BIN)/python launch/quickstart.py

sweep: install
	$(BIN)/python launch/sweep_quickstart.py

ui: install
	$(BIN)/python launch/ui.py --port $(UI_PORT)

# The unit tier alone: no process, no socket, about a minute.
quick: install
	$(BIN)/python -m pytest tests/unit --dist worksteal

test: quick
	$(BIN)/python -m pytest --ignore tests/unit

soak: install
	$(BIN)/python -m pytest -m soak --timeout 3600
	$(BIN)/python tests/mutants/run.py

# What the product computes, writes and prints, against the values of an earlier commit.
golden: install
	$(BIN)/python -m tests.golden check

# Each planted fault of tests/mutants/mutants.json must fail the tests that it names.
mutants: install
	$(BIN)/python tests/mutants/run.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Debian's packages for some tests: chromium (pages), buildah and mmdebstrap (the image), PostgreSQL (MLflow's database in k8s/). Without them
# those tests skip and say so. PostgreSQL would start a server of its own.
PACKAGES := chromium chromium-driver fonts-dejavu-core buildah mmdebstrap postgresql
debian:
	@if dpkg --status $(PACKAGES) > /dev/null 2>&1; \
	then echo "$(PACKAGES): all there"; \
	elif test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		mkdir -p /etc/postgresql-common && { test -e /etc/postgresql-common/createcluster.conf \
			|| echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf; } \
		&& apt-get update --quiet=2 \
		&& DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends $(PACKAGES) \
		|| echo "$(PACKAGES) could not be installed; their tests will skip"; \
	else echo "on Debian, as root: apt-get install $(PACKAGES); without them some tests will skip"; fi

# What launch/bench.py compares with, in an environment of its own (several GB: MosaicML Streaming brings torch).
peers:
	test -x .venv.peers/bin/python || $(PYTHON) -m venv .venv.peers
	.venv.peers/bin/python -m pip install --quiet --disable-pip-version-check -r launch/benchmarks/peers/requirements.txt

# Removes the environment and caches; runs/ (data, checkpoints, MLflow) stays.
clean:
	rm -rf .venv .venv.peers .venv.audit .mypy_cache .ruff_cache .pytest_cache *.egg-info
