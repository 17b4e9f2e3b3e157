"""What every part stands on: errors, files, progress, devices; knows nothing of models."""
