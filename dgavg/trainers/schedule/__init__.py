"""Schedules: decide the learning rate, and when training has gone on for long enough."""
