# Each target does all of its own set-up on an empty machine.
SHELL := /bin/bash
PYTHON = $(shell if [ -n "$$VIRTUAL_ENV" ]; then echo "$$VIRTUAL_ENV/bin/python"; else echo .venv/bin/python; fi)

.PHONY: setup demo test lint

setup:
	@bash dependencies.sh

# A video model is extracted in front of you: victim, student, the same student without the victim, chance.
demo: setup
	@$(PYTHON) grey_box/labels_only.py --demo
	@$(PYTHON) grey_box/swin_to_r21_kd.py --demo
	@$(PYTHON) -m extraction.report runs/labels_only_demo runs/swin_to_r21_kd_demo

test: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
