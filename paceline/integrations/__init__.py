"""Paceline inside other servers."""
