"""Attacks: ways to make a student out of a victim's answers to given or generated clips."""
