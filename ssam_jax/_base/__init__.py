"""What every other module may use: checks, trees, shardings, traced programs."""
