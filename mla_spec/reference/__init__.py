"""What MLA is: float64, pure functions, numpy only."""
