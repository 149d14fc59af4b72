"""Finds the schedule that costs what one may spend and stays nearest to the large model."""
