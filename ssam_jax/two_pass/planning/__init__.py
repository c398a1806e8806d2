"""What a choice of active leaves costs, and the best choice for a budget.

`counting` prepares the equations of a loss and its gradient, `costs` finds out which leaves each product is
paid for, `search` chooses, and `report` is what users call. Nothing imports from here but the doors, of
``two_pass`` and of ``ssam_jax``.
"""
