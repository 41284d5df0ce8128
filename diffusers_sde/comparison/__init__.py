"""Samplers side by side on one model from the same noise."""
