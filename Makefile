# firstlight: `make bench` and `make test` do everything on a fresh machine.
PYTHON ?= python3
SUITE  ?= quick
DEVICE ?= auto
ROOT   ?=
HOST   ?=
SOAK   ?=
ADOPT  ?=
# Of test-gpu: a folder of wheels, the folder of the results, and the limit of time.
WHEELS  ?=
OUT     ?=
SECONDS ?=

# -I: Python ignores its variables and the user's packages.
bootstrap = "$(PYTHON)" -I provision/bootstrap.py
place = $(if $(ROOT),--root "$(ROOT)") $(if $(HOST),--host "$(HOST)")
provision = $(bootstrap) && .venv/bin/python -I -m provision

.DEFAULT_GOAL := help
.PHONY: help setup plan status verify repair doctor undo bench validate report picture test test-gpu fuzz speed check fix \
	docs lock

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'
	@echo "  with ROOT=folder that survives  HOST=host.toml  SUITE=quick  DEVICE=auto|cpu|cuda  PYTHON=python3"

setup:  ## prepare this host: volume, links, environment, models
	@$(provision) setup $(place)

plan:  ## list what setup would change
	@$(provision) plan $(place)

status:  ## check quickly that nothing has drifted
	@$(provision) status $(place)

verify:  ## hash every file, and run a denoising step
	@$(provision) verify $(place)

repair:  ## make the links again after a wipe of the home (ADOPT=HOST:HOME takes over those of an earlier host)
	@$(provision) repair $(place) $(if $(ADOPT),--adopt "$(ADOPT)")

doctor:  ## report the provider, what the root's file system can do, and problems
	@$(provision) doctor $(place)

undo:  ## take back the changes of the last run
	@$(provision) undo $(place)

bench: setup  ## run setup, then measure this machine
	@.venv/bin/python -I -m bench run "$(SUITE)" --device "$(DEVICE)" $(place)

validate: setup  ## run setup, then check that each GPU is healthy and fast enough (SOAK=30m repeats the check)
	@.venv/bin/python -I -m bench validate --device "$(DEVICE)" $(if $(SOAK),--soak "$(SOAK)") $(place)

report:  ## print the last run as Markdown
	@$(bootstrap) && .venv/bin/python -I -m bench report

picture: toolbox  ## render the last run of the benchmark as docs/images/quick.svg
	@.venv/bin/python -I docs/picture.py

test: test_root  ## run setup for the tests, then every test (TESTS='-n0 -x tests/bench' selects some, in one process)
	@.venv/bin/python -I -m pytest -n auto $(TESTS)

test-gpu:  ## check a real card in 8 minutes, without a network (PYTHON=one with torch WHEELS=folder OUT=results)
	@"$(PYTHON)" -I tests/gpu/check_card.py --device "$(if $(filter auto,$(DEVICE)),cuda,$(DEVICE))" \
		$(if $(WHEELS),--wheels "$(WHEELS)") --out "$(or $(OUT),results/gpu)" $(if $(SECONDS),--seconds $(SECONDS))

fuzz: toolbox  ## give every parser and command damaged files, for about a minute (EXAMPLES=2000 gives each so many)
	@FUZZ_EXAMPLES="$(or $(EXAMPLES),100)" .venv/bin/python -I -m pytest -n auto tests/fuzz $(TESTS)

speed: test_root  ## run the speed comparisons of tests/speed
	@.venv/bin/python -I -m pytest tests/speed --benchmark-only --benchmark-disable-gc $(TESTS)

check: toolbox  ## run ruff, the format check, mypy and the import contract
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/python -I -m mypy && .venv/bin/lint-imports --no-cache

fix: toolbox  ## let ruff correct what it can
	@.venv/bin/ruff check --fix . ; .venv/bin/ruff format .

docs: toolbox  ## build the documentation into site/; a dead link or anchor fails
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -I -m mkdocs build --quiet --strict && echo "docs: site/index.html"

lock: toolbox  ## write all lock files again
	@.venv/bin/python -I -m provision env lock toolbox && .venv/bin/python -I -m provision env lock diffusers --keep-conda

.PHONY: toolbox test_root
toolbox:
	@$(bootstrap) --dev

test_root: toolbox
	@.venv/bin/python -I -m provision setup --quiet --root .cache/test-root --host tests/data/host.toml
