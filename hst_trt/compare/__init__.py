"""Schedules beside each other: the same prompts and seeds, distances to the large model, and what each costs."""
