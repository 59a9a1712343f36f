"""One module per stage, each with ``run(config, inputs, output_dir, logger) -> StageResult``.

Stages never import each other.
"""
