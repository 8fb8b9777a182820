"""What is learnt: losses, and the step of the optimizer they share."""
