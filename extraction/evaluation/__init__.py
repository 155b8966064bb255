"""Evaluation: scores of students and victims on held-out videos, results, pictures, and tables of many runs."""
