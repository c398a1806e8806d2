"""What every other module may use: checks, trees, boxes, shardings, traced programs."""
