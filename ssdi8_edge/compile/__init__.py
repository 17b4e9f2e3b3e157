"""From a checkpoint to a bundle: calibrate, quantize, export, pack."""
