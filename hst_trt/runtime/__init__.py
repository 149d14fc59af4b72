"""Backends: buffers, and engines that run on them; needs neither diffusers nor onnx."""
