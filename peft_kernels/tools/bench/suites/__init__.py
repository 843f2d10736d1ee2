"""What each op is measured on and against: one module an op, found by the op's name."""
