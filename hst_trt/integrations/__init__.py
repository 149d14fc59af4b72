"""Other systems' servers around `hst_trt.server`: each module is a thin one, and imports its system inside functions."""
