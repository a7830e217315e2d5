"""Judges folders of videos, whoever made them, and reports what it finds."""
