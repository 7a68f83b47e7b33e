# Everything from a bare machine with python3 (3.11 or newer) and make: uv comes through pip, the rest through uv.
# A second call of anything finds its set-up done.

.DEFAULT_GOAL := demo
.PHONY: setup demo test faults check bench services services-down lock clean

READY := .venv/.ready
TOOLS := .tools
UV := $(or $(shell command -v uv 2>/dev/null),$(TOOLS)/bin/uv)

setup: $(READY)

demo: $(READY)
	.venv/bin/trilogue demo video

# On real servers too: those that `make services` started, or else throw-away ones for this run.
test: $(READY)
	@python3 tools/services.py run -- .venv/bin/pytest

# All faults at all URLs, about half an hour; SEED= replays one, ONLY= and URLS= choose.
faults: $(READY)
	@PYTHONPATH=tests:tests/processes:tools FAULTS_WAITING=$(or $(WAITING),1000000) SEED=$(SEED) \
		.venv/bin/python tests/faults/campaign.py $(if $(ONLY),--only "$(ONLY)") $(if $(URLS),--urls $(URLS))

services:
	@python3 tools/services.py up

services-down:
	@python3 tools/services.py down

check: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(READY)
	.venv/bin/trilogue bench

lock: $(UV)
	$(UV) lock

clean:
	rm -rf .venv $(TOOLS) dist

$(READY): pyproject.toml uv.lock $(UV)
	$(UV) sync --frozen --quiet
	@touch $@

# --target, because distributions refuse to let pip write into the system's own packages.
$(TOOLS)/bin/uv:
	@python3 -m pip --version >/dev/null 2>&1 || (apt-get update -qq && apt-get install -y -qq python3-pip)
	python3 -m pip install --quiet --disable-pip-version-check --target $(TOOLS) uv
