"""The training application behind ``csq train``: data, models, recipes, one readable loop, checkpoints, plots."""
