"""One module a stage, each with ``run(config, inputs, folder, logger)``. Stages never import each other."""
