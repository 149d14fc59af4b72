"""What ``scripts/gpu_acceptance.py`` does: its parts, the child processes they run in, and the report."""
