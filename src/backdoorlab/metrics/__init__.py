"""Metrics: classification under attack, detection, and statistics over seeds."""
