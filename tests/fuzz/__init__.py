"""Hostile inputs by the thousand: see run.py."""
