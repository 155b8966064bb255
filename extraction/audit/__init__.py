"""The owner's audit: what answer types, defences and detectors leave a thief, and cost honest users."""
