"""Figures and pictures of the report and of the commands."""
