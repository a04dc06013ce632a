"""The algorithm, with torch alone: the ball, a step, the ascent policies, and the optimizer that joins them."""
