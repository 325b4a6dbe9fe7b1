"""Tracks of `speedrun.py`: what each measures, and how records are stored."""
