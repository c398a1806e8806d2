"""What a choice of active leaves costs, and the best choice for a budget."""
