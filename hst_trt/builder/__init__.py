"""From ONNX graphs to a bundle that a target can run."""
