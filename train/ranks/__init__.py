"""The processes that train together: how they join, sum, stop and die.

process.py is this process among them, watch.py tells which of them died, stops.py takes requests to
stop.
"""
