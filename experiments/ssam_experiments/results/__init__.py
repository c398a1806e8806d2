"""The neutral benchmark of docs/results.md: what every way of doing SAM buys, and what it costs."""
