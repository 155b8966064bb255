"""Clips: found in folders of videos, decoded, moved as uint8 and augmented on the device."""
