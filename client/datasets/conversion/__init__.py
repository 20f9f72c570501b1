"""Converts files of rows between formats, so that nothing is lost on the way there and back."""
