#!/usr/bin/env bash
# Build the wheel, install it, and use it in an empty folder. Dependencies come from the environment that calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${CI_PYTHON:-python3}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" .
"$python" -m venv "$folder/venv"
# Python reads no .pth file in a folder that is added by one, so an editable installation of Align stays out of sight.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > "$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
"$folder/venv/bin/pip" install --quiet --no-deps --ignore-installed "$folder"/align_llm-*.whl

mkdir "$folder/empty"
cd "$folder/empty"
unset PYTHONPATH
export PATH="$folder/venv/bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python - "$folder/venv" <<'PYTHON'
import importlib.metadata, pathlib, sys
import align
assert pathlib.Path(sys.argv[1]).resolve() in pathlib.Path(align.__file__).resolve().parents, align.__file__
assert importlib.metadata.version("align-llm") == align.__version__
assert pathlib.Path(align.__file__).with_name("py.typed").is_file()
PYTHON
align --version
align env

# The catalog is in the wheel: it names the reader of a public data set.
printf 'stages:\n  prepare: {source: hh-rlhf}\n' > hh.yaml
align plan hh.yaml
python -c 'from align.config.recipe import load_recipe
assert load_recipe("hh.yaml", []).stages["prepare"].reader == "hh"'

# So are the embedded data and the recipes: a recipe is named by its stem.
align run dpo prepare.max_rows=200 sft.model.hidden_size=32 sft.model.vocab_size=400 \
  sft.trainer.max_steps=2 dpo.trainer.max_steps=2 evaluate.max_new_tokens=8
test -f runs/dpo/summary.json
align plan dpo prepare.max_rows=200 sft.model.hidden_size=32 sft.model.vocab_size=400 \
  sft.trainer.max_steps=2 dpo.trainer.max_steps=2 evaluate.max_new_tokens=8 | tee plan.txt
test "$(grep -c ' reuse ' plan.txt)" = 4
