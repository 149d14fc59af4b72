"""From torch checkpoints to ONNX graphs: needs torch, diffusers, transformers and onnx; never TensorRT."""
