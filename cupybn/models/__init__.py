"""What is done with layers that belong to a model: checkpoints, folding, recalibration. Users import from `cupybn`."""
