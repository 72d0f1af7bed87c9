"""Argument parsing and output only: what a command does is in the package it calls."""
