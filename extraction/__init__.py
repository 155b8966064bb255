"""Model extraction for video classifiers: victims, students, clips, metered answers and the loops that use them."""
