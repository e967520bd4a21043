"""Training: one loop over Accelerate; a task owns what a step is."""
