"""How the demo pair that ships with hst_trt was made: drawn scenes, a small VAE, text encoders and two transformers."""
