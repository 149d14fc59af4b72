"""Judges the demo pair from its shipped weights: `python -m demo.evaluate`, in a checkout `make demo-eval`.

What is asked of each way to draw is whether it shows what the prompt names (a classifier that coloured blobs do not
fool), how near it stays to the large model's picture of the same seed, and how far its pictures are from real scenes. All
ways but large and small alone take the same measured time, so that what differs is what they do with it.
"""
