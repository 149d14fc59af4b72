"""A host in Python: opens a bundle once and draws every prompt that it is given.

python examples/python_host.py engines/demo-cpu.hstb "a red apple" "a penguin on the sea"
"""

import sys

from hst_trt import HybridStitchPipeline

path, *prompts = sys.argv[1:]
pipeline = HybridStitchPipeline.from_bundle(path)
for number, prompt in enumerate(prompts):
    output = pipeline(prompt, seed=7)
    output.images[0].save(f"{number}.png")
    print(f"{number}.png: {prompt}, {output.stats.large_compute_saved:.0%} of the large model's compute saved")
