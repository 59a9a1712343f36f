"""Check finished runs of `recipes/{dpo,kto,ppo}.yaml` against what the project set itself before it measured.

``python .ci/margins.py SUMMARY...``: win rate 0.80 with its interval above 0.75, 0.10 more gold, and a policy against itself that
cannot be told from a coin. With ``--reused`` before them: that nothing ran.
"""

import json
import sys
from pathlib import Path

for file in [name for name in sys.argv[1:] if name != "--reused"]:
    stages = json.loads(Path(file).read_text())["stages"]
    if "--reused" in sys.argv:
        assert [stage["status"] for stage in stages] == ["reused"] * 4, stages
        continue
    dpo, control = next(s for s in stages if s["name"] == "evaluate")["metrics"]["comparisons"]
    gain = dpo["mean_score"]["policy"] - dpo["mean_score"]["baseline"]
    assert dpo["win_rate"] >= 0.80, dpo
    assert dpo["ci"][0] > 0.75, dpo
    assert gain >= 0.10, dpo
    # A 95 % interval misses the truth once in 20: one and a half times as wide is 99.7 %, and CI has three seeds.
    half = (control["ci"][1] - control["ci"][0]) / 2
    assert abs(control["win_rate"] - 0.5) <= 1.5 * half, control
    print(f"win rate {dpo['win_rate']:.3f} {dpo['ci']}, gold +{gain:.3f}, itself {control['ci']}")
