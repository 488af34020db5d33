"""Evaluation of a student on held-out samples while it trains, and keeping the best one."""
