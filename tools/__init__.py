"""Builders of the data and corpora: what fetches and prepares them. Not part of the installed package."""
