# Les commandes du cours ; « make » seul les énumère. GNU Make 3.81 (macOS) suffit.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.complet
BUILD := _build
SPHINX = $(PY) -m sphinx -q -W --keep-going -j auto -d $(BUILD)/doctrees/$(1) -b $(1) . $(BUILD)/$(1)
PYTEST := $(PY) -m pytest
NOTEBOOKS := $(sort $(wildcard lessons/$(L)*.ipynb))
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with=tests/nbval_sanitize.cfg

# Ce qui rend les calculs comparables d’une exécution et d’une machine à l’autre, pour « lessons » comme pour
# « test ». Un fil par processus : deux carnets tournent de front, et des fils en trop se gênent (mesuré : 5 à 10
# fois plus lent) sans rien changer aux résultats.
export LLAMA_PROFIL := rapide
export OMP_NUM_THREADS := 1
export TQDM_DISABLE := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
ifeq ($(shell uname -m),x86_64)
export ATEN_CPU_CAPABILITY := avx2
endif
lessons notebooks: export CUDA_VISIBLE_DEVICES :=

# $(call timed,nom,commande) : la commande, puis sa durée.
timed = @start=$$(date +%s); $(2) && echo "— $(1) : $$(($$(date +%s) - start)) s"

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help html test lessons pdf epub serve bench pins clean lint unit network pages notebooks site

help: ## énumère les commandes
	@awk -F ':.*## ' '/^[a-z]+:.*## /{ printf "make %-8s %s\n", $$1, $$2 }' Makefile

html: site ## installe ce qu’il faut et construit le site
	@echo "Le site est prêt : ouvrez $(CURDIR)/$(BUILD)/html/index.html (ou « make serve »)."

test: lint unit network pages notebooks ## vérifie tout : code, carnets réexécutés et comparés, site

lessons: $(INSTALLED) ## réexécute les carnets sur place (L=04 : celui de la leçon 4)
	@$(PY) tools/notebooks.py $(NOTEBOOKS)

epub: $(INSTALLED) ## construit le livre électronique
	@$(call SPHINX,epub)
	@echo "Le livre est prêt : $$(ls $(BUILD)/epub/*.epub)"

pdf: $(INSTALLED) ## construit le PDF (demande LaTeX et latexmk)
	@command -v latexmk >/dev/null || { echo "latexmk est introuvable : installez TeX Live, puis relancez." >&2; exit 1; }
	@$(call SPHINX,latex)
	@$(MAKE) -C $(BUILD)/latex
	@echo "Le PDF est prêt : $$(ls $(BUILD)/latex/*.pdf)"

serve: site ## sert le site sur cette machine, à l’adresse affichée
	@$(PY) -m http.server --bind 127.0.0.1 --directory $(BUILD)/html

# Tous les fils et toutes les instructions de la machine, pour les deux concurrents.
bench: $(INSTALLED) ## compare les vitesses à celles des autres bibliothèques (dix minutes, machine au repos)
	@env -u OMP_NUM_THREADS -u ATEN_CPU_CAPABILITY $(PY) benchmarks/all.py --json $(BUILD)/bench.json

pins: $(INSTALLED) ## fige les dépendances indirectes installées dans constraints.txt
	@$(PY) -m pip freeze --all --exclude-editable --exclude pip > $(VENV)/pins
	@{ echo "# Toutes les versions installées, dépendances indirectes comprises. Écrit par « make pins »."; \
	  sed 's/+[a-z0-9.]*$$//' $(VENV)/pins; } > constraints.txt

clean: ## efface ce qui a été construit, mais pas l’environnement
	rm -rf $(BUILD) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@tools/install.sh "$(PYTHON)" $(VENV)

site: $(INSTALLED)
	@echo "Construction du site…"
	$(call timed,site,$(call SPHINX,html))

# Les parties de « make test », de la plus prompte à la plus longue.

lint: $(INSTALLED)
	$(call timed,style,$(PY) -m ruff check)

unit: $(INSTALLED)
	$(call timed,essais unitaires,$(PYTEST) -n 2 -m "not reseau and not navigateur")

network: $(INSTALLED)
	$(call timed,essais sur les sources,$(PYTEST) -m reseau)

pages: site
	@$(PY) tools/chromium.py
	$(call timed,essais des pages,$(PYTEST) -m navigateur)

notebooks: $(INSTALLED)
	@$(PYTEST) $(NBVAL) -n 2 --dist loadfile $(NOTEBOOKS)
