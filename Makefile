PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two at a time, a file's tests together, for they share what their module trained. Without reordering, files of few
# tests, which are long ones, don't come last, where nothing is left to run beside them.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-edit serve test test-slow lint clean

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed  ## train a LoRA with the zero-prior token on the small model, and draw with it
	$(BIN)/python -m examples.demo

demo-edit: $(VENV)/.installed  ## train LoRAs of an edit and of a subject on the small editing model, and edit with them
	$(BIN)/python -m examples.demo_edit

serve: $(VENV)/.installed  ## cog's server on the small model: predictions on port 5000, trainings on 5001
	$(BIN)/python -m examples.serve

test: $(VENV)/.installed  ## all tests but the slow ones, in minutes
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed  ## the slow ones
	$(PYTEST) -m slow

lint: $(VENV)/.installed  ## format, types, what is written from the list of inputs, and the length of sentences
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m scripts.cog_signatures --check
	$(BIN)/python -m scripts.prose_length

clean:  ## remove what was made
	rm -rf $(VENV) out build
