"""Train a policy by RLOO on a reward that is a Python function: short completions score higher.

About two minutes on one CPU core; the policy is the SFT model of ``recipes/sft.yaml``.

    python examples/custom_reward.py [STAGE.KEY=VALUE ...]
"""

import sys

import align


def brevity(prompts: list[list[dict[str, str]]], completions: list[str]) -> list[float]:
    """Score each completion by its length: 0 for an empty one, -1 for 100 characters."""
    return [-len(completion) / 100 for completion in completions]


def main(overrides: list[str]) -> None:
    """Run SFT and RLOO, and print how the score and the KL divergence changed."""
    rloo = {
        "model": "sft",
        "rewards": [brevity],
        "steps": 20,
        "batch_size": 64,
        "n_completions": 4,
        "max_new_tokens": 64,
        "learning_rate": 3e-4,
    }
    recipe = align.load_recipe({"needs": "sft", "stages": {"rloo": rloo}}, overrides=overrides)
    run = align.run(recipe, until="rloo")
    last = run["rloo"].metrics.training
    print(f"score {last.score:.3f}, KL to the SFT model {last.kl:.2f} nats per completion")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except align.UserError as error:
        sys.exit(str(error))
