# Each target does all of its own set-up on an empty machine.
SHELL := /bin/bash
PYTHON = $(shell if [ -n "$$VIRTUAL_ENV" ]; then echo "$$VIRTUAL_ENV/bin/python"; else echo .venv/bin/python; fi)
CHECKED = extraction grey_box black_box eval_only.py train_victim.py audit.py

.PHONY: help setup demo quick test tests lint golden tables picture audit

help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

setup:  ## the environment alone
	@bash dependencies.sh

# A video model is extracted in front of you: victim, student, the same student without the victim, chance.
demo: setup  ## extract a small video model: minutes on two CPU cores
	@$(PYTHON) grey_box/labels_only.py --demo
	@$(PYTHON) grey_box/swin_to_r21_kd.py --demo
	@$(PYTHON) -m extraction.evaluation.results runs/labels_only_demo runs/swin_to_r21_kd_demo

audit: setup  ## what stops a thief of the demo's victim, and what that costs honest users: half an hour on two CPU cores
	@$(PYTHON) audit.py --demo --quick

test: setup  ## lint, format, types, tests
	@$(MAKE) --no-print-directory -j2 lint tests

# Files in the order of tests/conftest.py, the longest first; xdist's own would end with the file of one long test.
tests: setup
	@$(PYTHON) -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

quick: setup  ## the tests of one room or file: make quick ROOM=victims
	@$(PYTHON) -m pytest -q -x tests/$(ROOM)

lint: setup  ## lint, format, types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy $(CHECKED)

golden: setup  ## every script shortened, compared bit for bit with what it gave before on this machine
	@$(PYTHON) tests/golden.py

tables: setup  ## all demos with three seeds, into docs/results.md: hours on two CPU cores
	@$(PYTHON) grey_box/run_all.py --demo --seeds 0 1 2 --write-docs
	@$(PYTHON) black_box/run_all.py --demo --seeds 0 1 2 --write-docs

picture: setup  ## docs/picture.png from real runs
	@$(PYTHON) grey_box/labels_only.py --demo
	@$(PYTHON) grey_box/swin_to_r21_kd.py --demo --views-per-clip 9 --out-dir runs/picture_kd
	@$(PYTHON) docs/picture.py
