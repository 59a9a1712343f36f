"""Win rate of one model against another on held-out prompts, judged by a reward model.

Models are Hub ids or folders; the prompts are the test split of a data set that Align can prepare.

    python examples/evaluate_hub_model.py POLICY BASELINE REWARD_MODEL [DATA] [N_PROMPTS]
"""

import sys

import align


def main(
    policy: str, baseline: str, reward_model: str, data: str = "hh-rlhf", n_prompts: str = "100"
) -> None:
    """Sample one completion a prompt from each model, score both, and compare."""
    prompts = align.prepare(data, test_fraction=0.1)["test"]["prompt"][: int(n_prompts)]
    judge = align.load_reward_model(reward_model)
    scores = []
    for seed, name in enumerate((policy, baseline)):  # equal seeds would couple the completions
        completions = align.load_policy(name).generate(prompts, temperature=0.7, seed=seed)
        scores.append(judge.score(prompts, completions))
    result = align.win_rate(*scores)
    low, high = result.interval
    print(
        f"{policy} against {baseline}: win rate {result.rate:.1%} on {result.n_prompts} prompts "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 6:
        sys.exit(
            "usage: python examples/evaluate_hub_model.py POLICY BASELINE REWARD_MODEL [DATA] "
            "[N_PROMPTS]"
        )
    try:
        main(*sys.argv[1:])
    except align.UserError as error:
        sys.exit(str(error))
