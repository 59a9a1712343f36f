"""Check the results of `recipes/{dpo,kto,ppo}.yaml` against bounds that were set beforehand.

``python .ci/margins.py SUMMARY...``: a win rate of at least 0.80 whose interval lies above 0.75, a
gold score that is higher by at least 0.10, and a policy against itself at a win rate that does not
differ from 0.5. With ``--reused``, check only that every stage was reused.
"""

import json
import sys
from pathlib import Path

for file in [name for name in sys.argv[1:] if name != "--reused"]:
    stages = json.loads(Path(file).read_text())["stages"]
    if "--reused" in sys.argv:
        assert [stage["status"] for stage in stages] == ["reused"] * 4, stages
        continue
    policy, itself = next(s for s in stages if s["name"] == "evaluate")["metrics"]["comparisons"]
    gain = policy["mean_score"]["policy"] - policy["mean_score"]["baseline"]
    assert policy["win_rate"] >= 0.80, policy
    assert policy["ci"][0] > 0.75, policy
    assert gain >= 0.10, policy
    # A 95 % interval misses the true value once in 20 runs; one and a half times as wide is 99.7 %.
    half_width = (itself["ci"][1] - itself["ci"][0]) / 2
    assert abs(itself["win_rate"] - 0.5) <= 1.5 * half_width, itself
    print(
        f"win rate {policy['win_rate']:.3f} {policy['ci']}, gold +{gain:.3f}, itself {itself['ci']}"
    )
