"""Requests, the scheduler and what the ranks run."""
