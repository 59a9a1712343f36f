"""Run the shipped DPO recipe on the embedded task and print its held-out win rate.

About two minutes on one CPU core. A second run reuses every stage.

    python examples/quickstart.py [STAGE.KEY=VALUE ...]
"""

import sys

import align


def main(overrides: list[str]) -> None:
    """Plan and run ``recipes/dpo.yaml``, then read the typed results."""
    recipe = align.load_recipe("dpo", overrides=overrides)
    for stage in align.plan(recipe):
        print(f"{stage.name:<10}{stage.status:<8}{stage.folder}")

    run = align.run(recipe)

    comparison = run["evaluate"].metrics.comparisons[0]
    low, high = comparison.ci
    print(
        f"{comparison.policy} against {comparison.baseline} on {comparison.n_prompts} held-out "
        f"prompts: win rate {comparison.win_rate:.1%} (95 % interval {low:.1%} to {high:.1%})"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except align.UserError as error:
        sys.exit(str(error))
